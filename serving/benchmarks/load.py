"""A load generator for HTTP/1.1 on kept connections: light, so that on a shared machine it measures the server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count

import numpy as np


@dataclass
class Load:
    """What became of some seconds of load.

    Args:
        rows: candidates of a request.
        seconds: from the first request to the last answer.
        latencies: seconds of each request that was answered with 200.
        others: answers by another status.
    """

    rows: int
    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    others: dict[int, int] = field(default_factory=dict)

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
        path: of every request.
        host: and port, as the header says them.
    """

    def __init__(self, path: str, host: str) -> None:
        self.head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: "
        self.buffer, self.need = bytearray(), -1
        self.answer: asyncio.Future[tuple[int, bytes]] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self.transport: asyncio.Transport = transport  # type: ignore[assignment]

    async def post(self, body: bytes) -> tuple[int, bytes]:
        """Return status and body of the answer."""
        self.answer = asyncio.get_running_loop().create_future()
        self.transport.write(f"{self.head}{len(body)}\r\n\r\n".encode() + body)
        return await self.answer

    def data_received(self, data: bytes) -> None:
        """Take a part of an answer."""
        self.buffer += data
        if self.need < 0:
            end = self.buffer.find(b"\r\n\r\n")
            if end < 0:
                return
            head = bytes(self.buffer[:end]).lower()
            length = head.partition(b"content-length:")[2].split(b"\r\n", 1)[0]
            self.need, self.body = end + 4 + int(length), end + 4
        if len(self.buffer) >= self.need and self.answer is not None:
            answer, self.answer = self.answer, None
            status, body = int(self.buffer[9:12]), bytes(self.buffer[self.body : self.need])
            del self.buffer[: self.need]
            self.need = -1
            answer.set_result((status, body))

    def connection_lost(self, error: Exception | None) -> None:
        """Fail what waits for an answer."""
        if self.answer is not None and not self.answer.done():
            self.answer.set_exception(error or ConnectionError("the server closed the connection"))


def load(
    port: int,
    path: str,
    bodies: Sequence[bytes],
    *,
    rows: int,
    clients: int,
    seconds: float,
    rate: float | None = None,
) -> Load:
    """Send requests for some seconds.

    Args:
        port: on 127.0.0.1.
        path: to post to.
        bodies: of the requests, in turn.
        rows: candidates of each.
        clients: connections; each sends its next request when it has its answer.
        seconds: how long.
        rate: requests a second, evenly spaced and sent whether or not others have been answered, as long as there
            is a free connection; latencies count from when a request was due. None sends as fast as answers come.
    """
    return asyncio.run(_load(port, path, bodies, rows, clients, seconds, rate))


async def _load(
    port: int, path: str, bodies: Sequence[bytes], rows: int, clients: int, seconds: float, rate: float | None
) -> Load:
    loop, found, number = asyncio.get_running_loop(), Load(rows), count()
    connections = [
        (await loop.create_connection(lambda: Connection(path, f"127.0.0.1:{port}"), "127.0.0.1", port))[1]
        for _ in range(clients)
    ]
    begin = time.perf_counter()
    end = begin + seconds

    async def client(connection: Connection) -> None:
        while True:
            i = next(number)
            due = time.perf_counter() if rate is None else begin + i / rate
            if due >= end:
                return
            wait = due - time.perf_counter()
            if wait > 0:
                await asyncio.sleep(wait)
            status, _ = await connection.post(bodies[i % len(bodies)])
            if status == 200:
                found.latencies.append(time.perf_counter() - due)
            else:
                found.others[status] = found.others.get(status, 0) + 1

    try:
        await asyncio.gather(*(client(connection) for connection in connections))
    finally:
        for connection in connections:
            connection.transport.close()
    found.seconds = time.perf_counter() - begin
    return found
