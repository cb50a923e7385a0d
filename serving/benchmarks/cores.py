"""The cores of a machine that a server and the generator of its load share, and what the machine itself takes."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

GAP = 0.001
"""Seconds between two looks at the clock from which a machine counts as having stood still."""


@contextmanager
def apart(port: int) -> Iterator[None]:
    """Keep the server at a port to all cores but the last, and this process to that one, while the block lasts.

    Left to the scheduler both may find themselves on one core for half a second, and the server's latency is then
    that of its neighbour. On a machine with one core, or without affinities, nothing is done.

    Args:
        port: on its command line; it must be a child of this process.
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
        yield
    finally:
        os.sched_setaffinity(0, cores)
        for thread in server.threads():
            os.sched_setaffinity(thread.id, cores)


def pauses(seconds: float) -> dict[str, float]:
    """Look at the clock all the time, and return how often the machine did something else meanwhile.

    What a server's p99 can't be better than, where the pauses take a hundredth of the time.

    Args:
        seconds: how long; nothing else should run.

    Returns:
        ``machine_pauses_per_second`` of a millisecond or more, ``machine_paused_share`` of the time, and
        ``machine_longest_pause_ms``.

    Example:
        >>> sorted(pauses(0.01))
        ['machine_longest_pause_ms', 'machine_paused_share', 'machine_pauses_per_second']
    """
    begin = last = time.perf_counter()
    found = []
    while last < begin + seconds:
        now = time.perf_counter()
        if now - last >= GAP:
            found.append(now - last)
        last = now
    return {
        "machine_pauses_per_second": len(found) / (last - begin),
        "machine_paused_share": sum(found) / (last - begin),
        "machine_longest_pause_ms": 1000 * max(found, default=0.0),
    }
