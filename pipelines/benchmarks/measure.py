"""How long calls take, and how much memory they need on their way."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any


def timed(calls: dict[str, Callable[[], Any]], rounds: int, device: str, least: float = 0.05) -> dict[str, float]:
    """Return the seconds of one call of each, the best of the rounds; the calls take turns in each round.

    Args:
        calls: what is timed, by name.
        rounds: how often each has its turn.
        device: ``cpu`` or ``cuda``, whose work is waited for.
        least: seconds that a turn takes about; a call that is shorter is repeated.
    """
    import torch

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    repeats, best = {}, dict.fromkeys(calls, float("inf"))
    for name, one in calls.items():
        for _ in range(3):  # the last of them without compilation or first touch
            wait()
            start = time.perf_counter()
            one()
            wait()
            once = time.perf_counter() - start
        repeats[name] = max(1, int(least / max(once, 1e-7)))
    for _ in range(rounds):
        for name, one in calls.items():
            wait()
            start = time.perf_counter()
            for _ in range(repeats[name]):
                one()
            wait()
            best[name] = min(best[name], (time.perf_counter() - start) / repeats[name])
    return best


def peak_memory(one: Callable[[], Any], device: str) -> int:
    """Return the most bytes of tensors that a call holds at a time, those that it was given left out.

    On CPU it is the height of all that torch's allocator gives and takes back, which its profiler notes one by one:
    unlike the process's memory, it does not depend on what was measured before.

    Args:
        one: what is measured.
        device: ``cpu`` or ``cuda``.

    Example:
        >>> import torch
        >>> peak_memory(lambda: torch.ones(1000).add(1).sum(), "cpu") // 1000
        8
    """
    import torch

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        one()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with _silent(), torch.autograd.profiler.profile(profile_memory=True) as profile:
        one()
    result = profile.kineto_results
    assert result is not None
    events = [event for event in result.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate((event.nbytes() for event in events), initial=0))


@contextmanager
def _silent() -> Iterator[None]:
    """Keep off the standard error what libraries write there without asking, as the profiler does."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
