"""Several processes on one port: started one after the other, replaced when they die or hang, drained together."""

from __future__ import annotations

import json
import logging
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Any

from ctr_models.errors import ArtifactError
from serving.settings import Settings

log = logging.getLogger("sluice.workers")

STEADY_SECONDS = 60.0
"""A worker that lived so long did not die of how it was started."""
LONGEST_PAUSE = 30.0
"""Seconds before a worker is started that died young again and again, at most."""
SPARE_SECONDS = 5.0
"""That a worker may take, after its drain, to write what it holds; then it is killed."""
MEMORY = "/dev/shm"
"""Where Linux keeps files in memory."""
LONGEST_FOLDER = 80
"""Bytes of a path that is short enough for the workers' sockets."""

Cards = list[dict[str, Any]]


@dataclass
class _Worker:
    """What is known of one."""

    number: int
    process: subprocess.Popen[bytes] | None = None
    ready: bool = False
    problem: dict[str, str] | None = None
    started: float = 0.0
    silent: float = 0.0
    heard: bytes = b""
    failures: int = 0
    again: float = 0.0


class Workers:
    """Supervises processes that accept connections from one listening socket.

    The first worker proves the settings: the others begin once it is ready, and if it can't be, its error is
    raised. Later on a worker that ends is replaced, at once, or with growing pauses if it does not live long; one
    that was ready and has been silent for ``hung_seconds`` is killed. A worker takes connections only when its
    models are loaded, so that a replacement never answers "not ready".

    Args:
        settings: with the number of workers.
        listener: shared by all.
        on_ready: called with the models' cards once the first worker is ready.
    """

    def __init__(self, settings: Settings, listener: socket.socket, on_ready: Callable[[Cards], None]) -> None:
        self._settings, self._listener, self._on_ready = settings, listener, on_ready
        self._workers = [_Worker(number) for number in range(settings.workers)]
        self._proven = self._stopping = False
        self._signal = signal.SIGTERM
        self._folder = ""
        self._looked = time.monotonic()
        self._selector = selectors.DefaultSelector()

    def run(self) -> int:
        """Supervise until SIGTERM or SIGINT.

        Returns:
            0 if all workers drained, 1 if one failed or had to be killed.

        Raises:
            ArtifactError: the first worker could not begin.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        with tempfile.TemporaryDirectory(prefix="sluice-", dir=_place()) as folder:
            self._folder = folder
            try:
                while not self._stopping and self._parent_lives():
                    self._start()
                    self._hear(0.1)
                    self._kill_hung()
                    self._bury()
            finally:
                self._listener.close()
                well = self._end()
        return int(not well)

    def _stop(self, number: int, _: object) -> None:
        self._signal = signal.Signals(number)
        if self._stopping:  # told again: at once
            for worker in self._workers:
                if worker.process is not None:
                    worker.process.send_signal(number)
        self._stopping = True

    def _parent_lives(self) -> bool:
        return self._settings.parent is None or os.getppid() == self._settings.parent

    def _start(self) -> None:
        """Start who is missing and due."""
        now = time.monotonic()
        for worker in self._workers:
            if worker.process is None and now >= worker.again and (self._proven or worker.number == 0):
                self._spawn(worker)

    def _spawn(self, worker: _Worker) -> None:
        told = {
            "settings": self._settings.model_dump(mode="json"),
            "number": worker.number,
            "listener": self._listener.fileno(),
            "folder": self._folder,
        }
        # A group of its own: Ctrl-C in a terminal is for the supervisor, which passes it on once.
        process = subprocess.Popen(
            [sys.executable, "-m", "serving.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[self._listener.fileno()],
            process_group=0,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        with suppress(BrokenPipeError):  # it is dead already, and will be buried
            process.stdin.write(json.dumps(told).encode() + b"\n")
            process.stdin.flush()  # and never closed: its end tells that this process has gone
        self._selector.register(process.stdout, selectors.EVENT_READ, worker)
        worker.process, worker.ready, worker.problem, worker.started = process, False, None, time.monotonic()
        worker.silent, worker.heard = 0.0, b""

    def _hear(self, seconds: float) -> None:
        """Wait for what workers have to tell."""
        for key, _ in self._selector.select(seconds):
            worker: _Worker = key.data
            stream = key.fileobj
            assert not isinstance(stream, int)
            content = _read(stream)  # type: ignore[arg-type]
            if not content:
                self._selector.unregister(stream)
            worker.silent = 0.0
            *lines, worker.heard = (worker.heard + content).split(b"\n")
            for line in filter(None, lines):
                self._told(worker, json.loads(line))

    def _told(self, worker: _Worker, told: dict[str, Any]) -> None:
        if "problem" in told:
            worker.problem = told
            return
        worker.ready = True
        assert worker.process is not None
        log.info("worker %d is ready", worker.number, extra={"fields": {"pid": worker.process.pid}})
        if not self._proven:
            self._proven = True
            self._on_ready(told["cards"])

    def _kill_hung(self) -> None:
        """Kill who has been silent for too long while this process could hear.

        However long ago it last looked, a look counts for a second at most: a pause of the whole machine is no
        silence.
        """
        now = time.monotonic()
        passed, self._looked = min(now - self._looked, 1.0), now
        for worker in self._workers:
            if worker.process is None or not worker.ready:
                continue
            worker.silent += passed
            if worker.silent > self._settings.hung_seconds:
                fields = {"seconds": round(worker.silent, 1)}
                log.error("worker %d hangs and is killed", worker.number, extra={"fields": fields})
                worker.process.kill()
                worker.ready = False

    def _bury(self) -> None:
        """Note who has ended, and when to replace him."""
        for worker in self._workers:
            if worker.process is None or worker.process.poll() is None:
                continue
            self._hear(0)
            code = worker.process.returncode
            self._forget(worker)
            if not self._proven:
                _fail(worker, code)
            young = time.monotonic() - worker.started < STEADY_SECONDS
            worker.failures = worker.failures + 1 if young else 0
            pause = min(LONGEST_PAUSE, 0.5 * 2**worker.failures) if worker.failures > 1 else 0.0
            worker.again = time.monotonic() + pause
            why = f": {worker.problem['problem']}" if worker.problem else ""
            log.error(
                "worker %d ended%s; another takes its place%s",
                worker.number,
                why,
                f" in {pause:g} s" if pause else "",
                extra={"fields": {"code": code}},
            )

    def _forget(self, worker: _Worker) -> None:
        process, worker.process, worker.ready = worker.process, None, False
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        if process.stdout in self._selector.get_map():
            self._selector.unregister(process.stdout)
        process.stdout.close()
        with suppress(BrokenPipeError):
            process.stdin.close()

    def _end(self) -> bool:
        """Drain all workers; kill whoever takes too long. Say whether all went well.

        Who is not ready has nothing to finish, and may take long to find time for a signal: it is killed at once.
        """
        self._hear(0)
        for worker in self._workers:
            if worker.process is not None and not worker.ready:
                worker.process.kill()
                worker.process.wait()
                self._forget(worker)
        living = [worker for worker in self._workers if worker.process is not None]
        for worker in living:
            assert worker.process is not None
            worker.process.send_signal(self._signal)
        deadline = time.monotonic() + self._settings.drain_seconds + self._settings.grace_seconds + SPARE_SECONDS
        well = True
        for worker in living:
            assert worker.process is not None
            try:
                worker.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                log.error("worker %d did not end in time and is killed", worker.number)
                worker.process.kill()
                worker.process.wait()
            well = well and worker.process.returncode == 0
            self._forget(worker)
        return well


def _place() -> str:
    """Return where the folder that workers share is made.

    In memory if that is to be had: a disk's page may be on its way to the disk when a request is to be counted. And
    where the path leaves room for the name of a socket, of which a system takes 107 bytes.
    """
    for folder in (MEMORY, tempfile.gettempdir()):
        if os.access(folder, os.W_OK | os.X_OK) and len(os.fsencode(folder)) <= LONGEST_FOLDER:
            return folder
    return "/tmp"


def _read(stream: IO[bytes]) -> bytes:
    """Read what there is, or the end."""
    return os.read(stream.fileno(), 65_536)


def _fail(worker: _Worker, code: int) -> None:
    told = worker.problem
    if told is not None:
        raise ArtifactError(told["problem"], where=told["where"], remedy=told["remedy"])
    raise RuntimeError(f"the first worker ended with code {code} before it was ready; see what it wrote")
