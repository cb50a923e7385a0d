"""Where the time of a request goes: its stages, one after the other, as histograms and traces show them."""

from __future__ import annotations

import time

STAGES = ("read", "decode", "fetch", "encode", "queue", "forward", "exposure", "reply")
"""The body from the network; its parsing, and dealing to an arm; features from the store; raw values to ids; the
wait for a forward pass; that pass, which others may share; the exposure on disk; the answer as bytes."""


class Stages:
    """The stages of a request, each beginning where the one before ended.

    Args:
        at: when the first begins, by ``time.perf_counter()``; now by default.

    Attributes:
        found: (stage, begin, end) of each that has ended.

    Example:
        >>> stages = Stages()
        >>> stages.end("read")
        >>> stages.part().end("encode")
        >>> [name for name, _, _ in stages.found]
        ['read', 'encode']
    """

    __slots__ = ("at", "found")

    def __init__(self, at: float | None = None) -> None:
        self.at = time.perf_counter() if at is None else at
        self.found: list[tuple[str, float, float]] = []

    def end(self, stage: str, at: float | None = None) -> None:
        """End a stage, now or at a moment that has passed; the next begins."""
        at = time.perf_counter() if at is None else at
        self.found.append((stage, self.at, at))
        self.at = at

    def part(self) -> Stages:
        """Return stages that begin now and run beside these, found together: those of one question among many."""
        part = Stages()
        part.found = self.found
        return part
