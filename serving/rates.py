"""How many requests a second each of many may send, counted once for all workers of a server."""

from __future__ import annotations

import logging
import mmap
import os
import time
from collections.abc import Callable
from pathlib import Path

log = logging.getLogger("sluice.security")
SLACK = 1e-6
"""Seconds that are taken for rounding, and not waited."""


class Limiter:
    """Lets each of many send so many requests a second on average, and a burst at once.

    Of each it keeps one number: the moment at which its share is whole again. That allows exactly what a bucket of
    tokens does (it is the generic cell rate algorithm). With a folder the number is in a file that all workers have
    mapped: what one lets in counts for all at once, and a worker that is replaced finds what was counted. There is
    no lock, so nobody waits for a worker that stands still; of two requests that two workers let in within the same
    microsecond one may go uncounted.

    Args:
        folder: shared by the workers of a server; None: this process counts alone.
        clock: seconds, never going back, the same in all processes.
        most: names kept in memory; of more, those heard of longest ago are dropped, and without a folder forgotten.

    Example:
        >>> limiter = Limiter(clock=lambda: 0.0)
        >>> limiter.take("shop", rate=2, burst=1), limiter.take("shop", rate=2, burst=1)
        (0.0, 0.5)
    """

    def __init__(
        self, folder: Path | None = None, *, clock: Callable[[], float] = time.monotonic, most: int = 10_000
    ) -> None:
        self._folder, self._clock, self._most = folder, clock, most
        self._whole: dict[str, list[float] | memoryview[float]] = {}  # by name: one moment

    def take(self, name: str, rate: float, burst: int) -> float:
        """Take a request of a share and return 0, or return the seconds after which there is one.

        Args:
            name: whose share; with a folder a file is called like it.
            rate: requests a second.
            burst: requests at once.
        """
        now = self._clock()
        cell = self._whole.pop(name, None)
        if cell is None:
            cell = self._open(name)
        self._whole[name] = cell
        whole = max(cell[0], now)
        wait = whole - now - (burst - 1) / rate
        if wait > SLACK:
            return wait
        cell[0] = whole + 1 / rate
        return 0.0

    def owe(self, name: str, rate: float, requests: int) -> None:
        """Count more requests against a share, as those of a batch, though they are answered at once."""
        cell = self._whole.get(name)
        if cell is not None:
            cell[0] += requests / rate

    def _open(self, name: str) -> list[float] | memoryview[float]:
        if len(self._whole) >= self._most:
            del self._whole[next(iter(self._whole))]
        if self._folder is None:
            return [0.0]
        try:
            handle = os.open(self._folder / f"{name}.rate", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                # What another wrote stays. Its place is taken now: a mapping can't say that the disk is full.
                os.posix_fallocate(handle, 0, 8)
                return memoryview(mmap.mmap(handle, 8)).cast("d")
            finally:
                os.close(handle)
        except OSError as error:
            log.warning("the rate of %s is counted by this worker alone (%s)", name, error.strerror)
            return [0.0]
