"""How many requests may be in hand so that none waits too long: as many as leave in that time."""

from __future__ import annotations

import math

FEW = 8
"""Requests in hand, on average: with fewer it is their senders who set the pace, not the server."""
WINDOW = 0.25
"""Seconds with something in hand, by which the pace is told."""
UNKNOWN = 64
"""Requests allowed until something was measured: enough to measure it, and few enough to wait for."""


class Pace:
    """Bounds what is in hand by Little's law: the last of L requests waits L / λ seconds if λ leave each second.

    λ is measured, and with it all that takes time: reading, encoding, passes, refusals, other processes.

    Args:
        most: that may be in hand, whatever is measured.
        seconds: that the last may be expected to wait.

    Attributes:
        in_hand: requests now.
        allowed: of them; never less than twice ``FEW`` (or ``most``), so that a bound that binds can be measured
            again. One that does not bind needs no measure, and stays: it is wanted when many come at once.

    Example:
        >>> pace = Pace(500, 0.1)
        >>> for i in range(20):
        ...     pace.enter(0.0)
        >>> for i in range(300):  # one leaves and one comes each millisecond
        ...     pace.leave(i / 1000)
        ...     pace.enter(i / 1000)
        >>> round(pace.allowed)
        100
    """

    def __init__(self, most: int, seconds: float = math.inf) -> None:
        self._most, self._seconds = most, seconds
        self._least = min(2 * FEW, most)
        self._rate = math.nan
        self.in_hand, self.allowed = 0, float(most if math.isinf(seconds) else min(most, UNKNOWN))
        self._at = self._busy = self._held = (
            0.0  # the last change; since the window began: seconds, request seconds
        )
        self._left = 0  # since then

    def enter(self, now: float) -> None:
        """Note that a request is let in, by ``time.perf_counter()``."""
        self._pass(now)
        self.in_hand += 1

    def leave(self, now: float, *, served: bool = True) -> None:
        """Note that one is done with; what was refused after all says nothing of how many can be served."""
        self._pass(now)
        self.in_hand -= 1
        self._left += served
        if self._busy >= WINDOW:
            self._tell()

    def _pass(self, now: float) -> None:
        if self.in_hand:
            self._busy += now - self._at
            self._held += self.in_hand * (now - self._at)
        self._at = now

    def _tell(self) -> None:
        if self._held >= FEW * self._busy:
            rate = self._left / self._busy
            self._rate = rate if math.isnan(self._rate) else (self._rate + rate) / 2
            self.allowed = min(float(self._most), max(float(self._least), self._rate * self._seconds))
        self._busy, self._held, self._left = 0.0, 0.0, 0
