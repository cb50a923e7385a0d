"""An open loop: requests come when they are due, however many are not answered yet, as they do from many people.

A closed loop slows down with the server that it measures, and so can't overload it. What is late here counts from
when it was due, whoever is to blame.
"""

from __future__ import annotations

import asyncio
import selectors
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from serving.benchmarks.load import Connection, messages

CONNECTIONS = 900
"""Most that are open at once; a server takes 1,000 by default."""
WAIT = 10.0
"""Seconds for the last answers; what is not answered then counts as lost."""


@dataclass(frozen=True)
class Answers:
    """What became of requests, in the order in which they were due; each array is (N,).

    Args:
        due: seconds after the beginning.
        sent: seconds after the request was due; infinite if it never was.
        taken: seconds from when it was due to its answer.
        status: of the answer; 0 where there was none.

    Example:
        >>> answers = Answers(np.arange(4.0), np.zeros(4), np.full(4, 0.002), np.array([200, 503, 200, 200]))
        >>> answers.during(1.0, 3.0).count(200), answers.milliseconds(503, 99)
        (1, 2.0)
    """

    due: np.ndarray
    sent: np.ndarray
    taken: np.ndarray
    status: np.ndarray

    def during(self, begin: float, end: float) -> Answers:
        """Return those that were due in a time, its end left out."""
        first, last = np.searchsorted(self.due, [begin, end])
        return Answers(*(one[first:last] for one in (self.due, self.sent, self.taken, self.status)))

    def __len__(self) -> int:
        return len(self.due)

    @property
    def failed(self) -> int:
        """How many were neither answered with 200 nor refused with 503."""
        return len(self) - self.count(200) - self.count(503)

    def count(self, status: int) -> int:
        """Return how many were answered so."""
        return int((self.status == status).sum())

    def sent_by(self, end: float) -> int:
        """Return how many were sent before a time; those that no connection could be had for were not."""
        return int((self.due + self.sent < end).sum())

    def milliseconds(self, status: int, percentile: float) -> float:
        """Return a percentile of the time from due to such an answer; nan if there was none."""
        taken = self.taken[self.status == status]
        return 1000 * float(np.percentile(taken, percentile)) if len(taken) else float("nan")


def offer(
    port: int,
    path: str,
    bodies: Sequence[bytes],
    phases: Sequence[tuple[float, float]],
    *,
    connections: int = CONNECTIONS,
    every: float = 0.5,
    watch: Callable[[float], Any] = lambda at: None,
) -> Answers:
    """Send evenly spaced requests at one rate after the other.

    A request takes the connection that became free last, or a new one; if so many are open as may be, it waits.

    Args:
        port: on 127.0.0.1.
        path: to post to.
        bodies: of the requests, in turn.
        phases: requests a second, and for how many seconds.
        connections: most at once.
        every: seconds between two calls of ``watch``.
        watch: called with the seconds since the beginning.
    """
    source = _Source(port, messages(port, path, bodies), connections)
    with asyncio.Runner(loop_factory=_precise) as runner:
        return runner.run(source.run(np.concatenate(list(_due(phases))), every, watch))


def _precise() -> asyncio.AbstractEventLoop:
    """Return a loop whose timers are a twentieth of a millisecond late; those of epoll are by up to a whole one.

    To wait without sleeping would do too, but slows down a server on the other thread of the same core by half.
    """
    return asyncio.SelectorEventLoop(selectors.SelectSelector())


def _due(phases: Sequence[tuple[float, float]]) -> Iterator[np.ndarray]:
    begin = 0.0
    for rate, seconds in phases:
        yield begin + np.arange(round(rate * seconds)) / rate
        begin += seconds


class _Source:
    """What sends, and notes what comes back."""

    def __init__(self, port: int, requests: Sequence[bytes], most: int) -> None:
        self.port, self.requests, self.most = port, requests, most
        self.free: list[Connection] = []
        self.late: deque[int] = deque()  # due, but no connection is free
        self.open = 0  # connections, those included that are being made
        self.number: dict[Connection, int] = {}  # of the request that each carries
        self.again: set[int] = set()  # sent a second time
        self.making: set[asyncio.Task[None]] = set()

    async def run(self, due: np.ndarray, every: float, watch: Callable[[float], Any]) -> Answers:
        self.loop, self.over = asyncio.get_running_loop(), asyncio.Event()
        self.due, self.next, self.left = due.tolist(), 0, len(due)
        self.sent, self.taken = np.full(len(due), np.inf), np.full(len(due), np.nan)
        self.status = np.zeros(len(due), dtype=np.int64)
        self.begin = time.perf_counter()
        if not self.left:
            self.over.set()
        watching = asyncio.create_task(self._watch(every, watch))
        self._tick()
        with suppress(TimeoutError):
            await asyncio.wait_for(self.over.wait(), (self.due[-1] if self.due else 0.0) + WAIT)
        watching.cancel()
        for task in self.making:
            task.cancel()
        for connection in [*self.free, *self.number]:
            connection.close()
        return Answers(due, self.sent, self.taken, self.status)

    async def _watch(self, every: float, watch: Callable[[float], Any]) -> None:
        while True:
            watch(time.perf_counter() - self.begin)
            await asyncio.sleep(every)

    def _tick(self) -> None:
        """Send what is due, and come back for the next."""
        now, many = time.perf_counter() - self.begin, len(self.due)
        while self.next < many and self.due[self.next] <= now:
            self._send(self.next)
            self.next += 1
        if self.next < many:
            self.loop.call_later(self.due[self.next] - now, self._tick)

    def _send(self, number: int) -> None:
        while self.free:
            connection = self.free.pop()
            if not connection.closed:
                self._carry(connection, number)
                return
            self.open -= 1
        self.late.append(number)
        self._open()

    def _open(self) -> None:
        if self.open < self.most and len(self.making) < len(self.late):
            self.open += 1
            task = self.loop.create_task(self._connect())
            self.making.add(task)
            task.add_done_callback(self.making.discard)

    async def _connect(self) -> None:
        try:
            make = self.loop.create_connection(lambda: Connection(self._answered), "127.0.0.1", self.port)
            _, connection = await make
        except OSError:
            self.open -= 1
            if self.late:
                self._note(self.late.popleft(), 0)
            return
        self._ready(connection)

    def _ready(self, connection: Connection) -> None:
        if self.late:
            self._carry(connection, self.late.popleft())
        else:
            self.free.append(connection)

    def _carry(self, connection: Connection, number: int) -> None:
        self.number[connection] = number
        self.sent[number] = time.perf_counter() - self.begin - self.due[number]
        connection.send(self.requests[number % len(self.requests)])

    def _answered(self, connection: Connection, status: int) -> None:
        number = self.number.pop(connection)
        if not status and connection.answers and number not in self.again:
            # The server ended an idle connection while the request was on its way: clients try such anew, once.
            self.again.add(number)
            self.late.appendleft(number)
        else:
            self._note(number, status)
        if not connection.closed:
            self._ready(connection)
            return
        self.open -= 1
        if self.late:
            self._open()

    def _note(self, number: int, status: int) -> None:
        self.taken[number] = time.perf_counter() - self.begin - self.due[number]
        self.status[number] = status
        self.left -= 1
        if not self.left:
            self.over.set()
