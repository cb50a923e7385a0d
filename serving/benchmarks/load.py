"""A closed loop: clients that send their next request when they have their answer.

The generator is light, so that on a shared machine it measures the server: bytes that are ready, HTTP/1.1 on kept
connections, and of an answer no more is read than its status and its length.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

K = TypeVar("K")


@dataclass
class Load:
    """What became of some seconds of load.

    Args:
        rows: candidates of a request.
        seconds: how long it lasted.
        latencies: seconds of each request that was answered with 200.
        others: answers by another status; 0 is a connection that ended without one.

    Example:
        >>> both = Load(100, 0.5, [0.010] * 40) + Load(100, 0.5, [0.020] * 20, {503: 1})
        >>> both.rows_per_second, both.milliseconds(50), both.others
        (6000.0, 10.0, {503: 1})
    """

    rows: int
    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    others: dict[int, int] = field(default_factory=dict)

    def __add__(self, other: Load) -> Load:
        """Return both together, as if the one had gone on where the other ended."""
        others = dict(Counter(self.others) + Counter(other.others))
        return Load(self.rows, self.seconds + other.seconds, self.latencies + other.latencies, others)

    @property
    def requests_per_second(self) -> float:
        """Answered with 200."""
        return len(self.latencies) / self.seconds

    @property
    def rows_per_second(self) -> float:
        """Of answers with 200."""
        return self.rows * self.requests_per_second

    def milliseconds(self, percentile: float) -> float:
        """Return a percentile of the latencies."""
        return 1000 * float(np.percentile(self.latencies, percentile)) if self.latencies else float("nan")


class Connection(asyncio.Protocol):
    """One kept connection, one request at a time.

    Args:
        answered: called with the connection and the status of each answer; 0 if the connection ended without one.

    Attributes:
        waits: whether a request is not answered yet.
        answers: so far.
        closed: whether it can take no more.
    """

    def __init__(self, answered: Callable[[Connection, int], None]) -> None:
        self._answered = answered
        self._buffer, self._need, self._closes = bytearray(), -1, False
        self.waits = self.closed = False
        self.answers = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport: asyncio.Transport = transport  # type: ignore[assignment]

    def send(self, request: bytes) -> None:
        """Send a request, see :func:`messages`."""
        self.waits = True
        self._transport.write(request)

    def close(self) -> None:
        """Send no more; an answer that is awaited is not counted."""
        self.waits, self.closed = False, True
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        """Take a part of an answer."""
        self._buffer += data
        if self._need < 0:
            end = self._buffer.find(b"\r\n\r\n")
            if end < 0:
                return
            head = bytes(self._buffer[:end]).lower()
            length = head.partition(b"content-length:")[2].split(b"\r\n", 1)[0]
            self._need, self._closes = end + 4 + int(length), b"\r\nconnection: close" in head
        if len(self._buffer) >= self._need and self.waits:
            status = int(self._buffer[9:12])
            del self._buffer[: self._need]
            self._need, self.waits = -1, False
            self.answers += 1
            if self._closes:
                self.closed = True
                self._transport.close()
            self._answered(self, status)

    def connection_lost(self, error: Exception | None) -> None:
        """Tell whoever waits for an answer."""
        self.closed = True
        if self.waits:
            self.waits = False
            self._answered(self, 0)


def messages(port: int, path: str, bodies: Sequence[bytes]) -> list[bytes]:
    """Return requests as they go over the wire.

    Example:
        >>> messages(80, "/v1/score", [b"{}"])[0].splitlines()[0]
        b'POST /v1/score HTTP/1.1'
    """
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\nContent-Length: "
    return [f"{head}{len(body)}\r\n\r\n".encode() + body for body in bodies]


def load(
    port: int, path: str, bodies: Sequence[bytes], *, rows: int, clients: int, seconds: float, warm: float = 0.0
) -> Load:
    """Send requests for some seconds, as fast as answers come.

    After a warm-up, what is counted begins with an answer and ends with one, so that answers that come several at a
    time are not cut apart; of the clients all are under way by then. What was sent within is waited for.

    Args:
        port: on 127.0.0.1.
        path: to post to.
        bodies: of the requests, in turn.
        rows: candidates of each.
        clients: connections; each sends its next request when it has its answer.
        seconds: how long, at least.
        warm: seconds before; what is sent in them is not counted.
    """
    return asyncio.run(_load(port, messages(port, path, bodies), rows, clients, seconds, warm))


async def _load(port: int, requests: Sequence[bytes], rows: int, clients: int, seconds: float, warm: float) -> Load:
    loop, found = asyncio.get_running_loop(), Load(rows)
    sent: dict[Connection, float] = {}
    number, left = 0, clients
    start, begin, end = 0.0, math.inf, math.inf
    over = asyncio.Event()

    def answered(connection: Connection, status: int) -> None:
        nonlocal begin, end
        now = time.perf_counter()
        if sent[connection] >= begin:
            if status == 200:
                found.latencies.append(now - sent[connection])
            else:
                found.others[status] = found.others.get(status, 0) + 1
        elif now >= start + warm:
            begin = min(begin, now)
        if now >= begin + seconds:
            end = min(end, now)
        send(connection, now)

    def send(connection: Connection, now: float) -> None:
        nonlocal number, left
        if now >= begin + seconds or connection.closed:
            left -= 1
            if not left:
                over.set()
            return
        sent[connection] = now
        connection.send(requests[number % len(requests)])
        number += 1

    connections = [
        (await loop.create_connection(lambda: Connection(answered), "127.0.0.1", port))[1] for _ in range(clients)
    ]
    start = time.perf_counter()
    begin = math.inf if warm else start
    for connection in connections:
        send(connection, start)
    await over.wait()
    found.seconds = min(end, time.perf_counter()) - (start if begin == math.inf else begin)
    for connection in connections:
        connection.close()
    return found


def calls(one: Callable[[], object], *, rows: int, seconds: float, warm: float = 0.0) -> Load:
    """Call a function again and again, in this process: the same load without a server.

    Args:
        one: what is called.
        rows: candidates of a call.
        seconds: how long, at least.
        warm: seconds before that are not counted.

    Example:
        >>> found = calls(lambda: time.sleep(0.001), rows=5, seconds=0.01)
        >>> found.seconds >= 0.01 and found.milliseconds(50) >= 1
        True
    """
    found, start = Load(rows), time.perf_counter()
    while time.perf_counter() < start + warm:
        one()
    begin = last = time.perf_counter()
    while last < begin + seconds:
        one()
        now = time.perf_counter()
        found.latencies.append(now - last)
        last = now
    found.seconds = last - begin
    return found


def in_turns(
    turns: Mapping[K, Callable[[], Load]], rounds: int, begins: Callable[[int], object] = lambda number: None
) -> dict[K, Load]:
    """Return what became of each, together over the rounds; in a round each has one turn.

    So what is compared was measured in the same seconds: the speed of a machine that others use too may double from
    one minute to the next.

    Args:
        turns: what is measured.
        rounds: how many.
        begins: called with the number of a round, from 1.
    """
    found: dict[K, Load] = {}
    for number in range(1, rounds + 1):
        begins(number)
        for key, turn in turns.items():
            found[key] = found[key] + turn() if key in found else turn()
    return found
