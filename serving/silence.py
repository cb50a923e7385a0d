"""Servers that hang: they keep a connection, answer nothing, and look after no timeout of their own."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

LOOK_SECONDS = 0.25


class Silence:
    """Hangs up on servers that are silent for too long, so that who waits for them gets an error.

    One thread looks after all; to be looked after costs a microsecond or two.

    Example:
        >>> here, there = socket.socketpair()
        >>> with Silence().limit(here, seconds=0.01):
        ...     here.recv(1)
        b''
    """

    def __init__(self) -> None:
        self._waiting: dict[object, tuple[float, Any]] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    @contextmanager
    def limit(self, connection: Any, seconds: float) -> Iterator[None]:
        """Give a server so long for what is inside the block.

        Args:
            connection: with a ``fileno()``, below zero or an error if it is closed.
            seconds: after which it is cut.
        """
        if self._thread is None or not self._thread.is_alive():  # none outlives a fork
            self._start()
        mark = object()
        self._waiting[mark] = time.monotonic() + seconds, connection
        try:
            yield
        finally:
            del self._waiting[mark]

    def _start(self) -> None:
        with self._lock:
            if self._thread is None or not self._thread.is_alive():
                self._waiting.clear()  # after a fork those are the parent's
                self._thread = threading.Thread(target=self._run, name="silence", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        while True:
            time.sleep(LOOK_SECONDS)
            now = time.monotonic()
            for end, connection in list(self._waiting.values()):
                if now > end:
                    _cut(connection)


def _cut(connection: Any) -> None:
    # It may have been closed meanwhile, and says so in its own way.
    with suppress(Exception), socket.socket(fileno=os.dup(connection.fileno())) as line:
        line.shutdown(socket.SHUT_RDWR)
