"""The cores of a machine that a server and the generator of its load share, and what the machine itself takes."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

GAP = 0.001
"""Seconds between two looks at the clock from which a machine counts as having stood still."""
WINDOW, SLOW = 0.005, 0.8
"""Seconds of which looks at the clock are counted, and the share of the usual number below which they were slow."""


@contextmanager
def apart(port: int, *, first: bool = False) -> Iterator[None]:
    """Keep the server at a port to all cores but the last, and this process to that one, while the block lasts.

    Left to the scheduler both may find themselves on one core for half a second, and the server's latency is then
    that of its neighbour. With one core, or without affinities, nothing is done.

    Args:
        port: on its command line; it must be a child of this process.
        first: let this process go before all else on its core, where it may: what the kernel does there for
            milliseconds would count as the server's. Not for one that needs all of the core, for Linux takes it
            away from such a one for a twentieth of each second.
    """
    import psutil

    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if len(cores) < 2:
        yield
        return
    server = next(one for one in psutil.Process().children() if str(port) in one.cmdline())
    try:
        for thread in server.threads():
            os.sched_setaffinity(thread.id, cores[:-1])
        os.sched_setaffinity(0, cores[-1:])
        if first:
            with suppress(OSError):  # who is not root may not
                os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(1))
        yield
    finally:
        if first:
            with suppress(OSError):
                os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
        os.sched_setaffinity(0, cores)
        for thread in server.threads():
            os.sched_setaffinity(thread.id, cores)


def pauses(seconds: float) -> dict[str, float]:
    """Look at the clock all the time, and return how often the machine did something else meanwhile.

    What a server's p99 can't be better than, where the pauses take a hundredth of the time. A core whose caches or
    units somebody else uses too does not stand still but is slow, for some milliseconds or for seconds.

    Args:
        seconds: how long; nothing else should run.

    Returns:
        ``machine_pauses_per_second`` of a millisecond or more, ``machine_paused_share`` of the time,
        ``machine_longest_pause_ms``, and ``machine_slow_share``: of windows of five milliseconds, those in which
        less than 0.8 of the usual was done.

    Example:
        >>> sorted(pauses(0.02))
        ['machine_longest_pause_ms', 'machine_paused_share', 'machine_pauses_per_second', 'machine_slow_share']
    """
    begin = last = time.perf_counter()
    found, looks, end = [], [0], begin + WINDOW
    while last < begin + seconds:
        now = time.perf_counter()
        if now - last >= GAP:
            found.append(now - last)
        if now >= end:
            looks.append(0)
            end = now + WINDOW
        looks[-1] += 1
        last = now
    usual = statistics.median(looks[:-1] or looks)  # the last window was cut short
    return {
        "machine_slow_share": statistics.fmean(one < SLOW * usual for one in looks[:-1] or looks),
        "machine_pauses_per_second": len(found) / (last - begin),
        "machine_paused_share": sum(found) / (last - begin),
        "machine_longest_pause_ms": 1000 * max(found, default=0.0),
    }
