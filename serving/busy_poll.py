"""Busy polling: between requests that come soon after each other the event loop does not sleep."""

from __future__ import annotations

import asyncio
import math
import time


class BusyPoll:
    """Keeps an event loop awake for the next request, if the one before came as soon.

    A core that has slept is slow when it wakes, the more so a virtual one: its caches hold what others needed
    meanwhile. While a request is in hand nothing polls, for its pass may need the core.

    Args:
        seconds: that are waited for a request at most.

    Example:
        >>> async def main():
        ...     polling = BusyPoll(0.01)
        ...     for _ in range(2):
        ...         polling.begin(time.perf_counter())
        ...         polling.end(time.perf_counter())
        ...     return polling.awake
        >>> asyncio.run(main())
        True
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._in_hand, self._since, self._soon = 0, -math.inf, False
        self.awake = False
        """Whether the event loop does not sleep now."""

    def begin(self, now: float) -> None:
        """Take note of a request, by ``time.perf_counter()``."""
        if not self._in_hand:
            self._soon = now - self._since <= self._seconds
        self._in_hand += 1

    def end(self, now: float) -> None:
        """Take note that a request has its answer."""
        self._in_hand -= 1
        if self._in_hand:
            return
        self._since = now
        if self._soon and not self.awake:
            self.awake = True
            self._poll(asyncio.get_running_loop())

    def _poll(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._in_hand or time.perf_counter() - self._since > self._seconds:
            self.awake = False
        else:
            loop.call_soon(self._poll, loop)  # a loop with something to do looks for news, and does not wait for it
