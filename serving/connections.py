"""Connections within limits: heads that are too large, requests that are too slow, answers that are not read.

uvicorn's protocol for HTTP/1.1 leaves these to a proxy; a server that is reached directly needs them itself.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from http import HTTPStatus
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from serving.line import Line

HEAD_BYTES = 32 * 1024
"""Of a request's line and headers; of what comes between the chunks of a body, and behind the last."""
AHEAD = 16
"""Requests that a client may send ahead on a connection, while one is being answered."""
Door = Callable[[int, bytes, bytes, Sequence[tuple[bytes, bytes]]], tuple[bytes, bool] | None]
"""Told how many requests are in hand, and method, target and headers of another: says how it is turned away, and
whether the connection is kept; or None. See :class:`serving.door.Door`."""


class Connection(HttpToolsProtocol):
    """uvicorn's protocol with limits; :func:`protocol` sets them.

    Attributes:
        seconds: that a head may take to arrive, then its body, and an answer to be read.
        most: connections of the process; those beyond are closed at once.
        door: asked whether a request is let in.
    """

    seconds = 10.0
    most = 1000
    door: Door | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._line = Line()
        self._answered: RequestResponseCycle | None = None  # the request whose turn it is, or was last
        self._timer: asyncio.TimerHandle | None = None  # until which what is being sent must be here
        self._unread: asyncio.TimerHandle | None = None  # until which the client must read
        self._head, self._size = True, 0  # whether a head is awaited, and bytes since the last request's end
        self._beside = 0  # bytes of a body's frame since its last part: a chunk's extension, trailers
        self._status = 400
        self._away = False  # whether the request that arrives has had its answer at the door
        self._offers = False  # whether it offers another protocol
        if len(self.connections) > self.most:
            transport.abort()
            return
        self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        self._line.lost = True
        if self._answered is not None and not self._answered.response_complete:
            self._answered.disconnected = True  # uvicorn tells only the last that came
        self._disarm()
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._size += len(data)
        self._beside += len(data)
        self._unset_keepalive_if_required()
        self._feed(data)
        if not self._size or self.transport.is_closing():
            return
        if (self._size if self._head else self._beside) > HEAD_BYTES:
            self._give_up(431)
        elif self._timer is None:
            self._arm()

    def _feed(self, data: bytes) -> None:
        """Parse what arrived. A request that offers another protocol is read again, without the offer.

        The parser takes no body of such a request, but would take it for the next one.
        """
        pieces: list[bytes | memoryview] = [data]
        while pieces:
            piece = pieces.pop(0)
            try:
                self.parser.feed_data(piece)
            except httptools.HttpParserUpgrade as stopped:
                rest = memoryview(piece)[stopped.args[0] :]
                pieces = [self._declined(), *([rest] if rest else []), *pieces]
            except httptools.HttpParserError:
                self.logger.warning("Invalid HTTP request received.")
                self.send_400_response("")
                return

    def _declined(self) -> bytes:
        """Return the head that made the parser stop, without what it offers."""
        self._offers = False
        lines = [b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())]
        lines += [b"%b: %b" % (name, value) for name, value in self.headers if name != b"upgrade"]
        return b"\r\n".join(lines) + b"\r\n\r\n"

    def on_headers_complete(self) -> None:
        """Hand the request over, unless its head is too large."""
        if self._size > HEAD_BYTES and len(self.url) + sum(map(_length, self.headers)) > HEAD_BYTES:
            self._status = 431
            raise ValueError("the head is too large")  # the parser stops, and send_400_response is called
        if len(self.pipeline) >= AHEAD:
            self._status = 429
            raise ValueError("too many requests wait for their turn")
        self._offers = self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT"
        if self._offers:
            return  # the parser stops
        self._head, self._beside = False, 0
        self._disarm()
        if not self._turned_away():
            self.scope["state"]["line"] = self._line
            super().on_headers_complete()
        self.headers = []  # trailers go there, and change nothing of a request that is being answered

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._answered = cycle
        if cycle.scope["method"] != "HEAD":  # whose answer is a head alone
            cycle.transport = _Whole(self.transport)  # type: ignore[assignment]
        super()._start_asgi_task(cycle, app)

    def on_body(self, body: bytes) -> None:
        """Take a part of a body that somebody waits for."""
        self._beside = 0
        if not self._away:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """Await the next head."""
        if self._offers:
            return
        if self._away:
            self._away = False
            if not self.transport.is_closing():
                handler = self.timeout_keep_alive_handler
                self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, handler)
        else:
            super().on_message_complete()
        self._head, self._size = True, 0
        self._disarm()

    def _turned_away(self) -> bool:
        """Ask the door; answer a request that is turned away."""
        if self.door is None or (self.cycle is not None and not self.cycle.response_complete):
            return False  # there is none, or it is not this request's turn to be answered
        answer = self.door(len(self.tasks), self.parser.get_method(), self.url, self.headers)
        if answer is None:
            return False
        self._away = True
        told, kept = answer
        self.transport.write(told)
        if not (kept and self.parser.should_keep_alive()):
            self.transport.close()
        return True

    def _should_upgrade_to_ws(self) -> bool:
        """Speak HTTP only, whatever libraries there are."""
        return False

    def send_400_response(self, msg: str) -> None:
        """Say that this is no HTTP, or too much of it."""
        self._end(self._status)

    def pause_writing(self) -> None:
        """Wait for the client to read, but not for ever."""
        super().pause_writing()
        self._unread = self.loop.call_later(self.seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """Go on: the client reads."""
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def timeout_keep_alive_handler(self) -> None:
        """End an idle connection, with what its client did not read."""
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            super().timeout_keep_alive_handler()

    def _arm(self) -> None:
        self._timer = self.loop.call_later(self.seconds, self._late)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _late(self) -> None:
        self._give_up(408)

    def _give_up(self, status: int) -> None:
        """End a connection on which a head, or a body, does not come as it should."""
        if not self._away and (self._head or not self.cycle.response_started):
            self._end(status)
        else:
            self.transport.close()  # a body that nobody waits for: its request is answered

    def _end(self, status: int) -> None:
        """Answer what never became a request, and close the connection."""
        self._disarm()
        if self.transport.is_closing():
            return
        message, kind = _PROBLEMS[status]
        content: dict[str, Any] = {"detail": [{"loc": [], "msg": message, "type": kind}], "request_id": ""}
        body = json.dumps(content).encode()
        head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
        head += f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        self.transport.write(head.encode() + body)
        self.transport.close()


class _Whole:
    """A transport for the answer to one request: its head waits for the first part of its body, and leaves with it.

    Apart they would be two packets, and the client would be woken by the first.

    Args:
        transport: of the connection.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport, self._head = transport, b""
        self.is_closing = transport.is_closing

    def write(self, data: bytes) -> None:
        """Send what an answer consists of, or what comes before it: 100 Continue."""
        if self._head:
            self._transport.write(self._head + data)
            self._head = b""
        elif data.startswith(b"HTTP/1.1 ") and not data.startswith(b"HTTP/1.1 100 "):
            self._head = data
        else:
            self._transport.write(data)

    def close(self) -> None:
        """Send a head whose body never came, and end the connection."""
        if self._head:
            self.write(b"")
        self._transport.close()


_PROBLEMS = {
    400: ("this is no HTTP/1.1 request", "http_invalid"),
    408: ("the request did not arrive in time", "too_slow"),
    429: (f"more than {AHEAD} requests were sent ahead of their answers", "too_far_ahead"),
    431: (f"the request's line and headers are larger than {HEAD_BYTES:,} bytes", "head_too_large"),
}


def _length(header: tuple[bytes, bytes]) -> int:
    return len(header[0]) + len(header[1])


def protocol(*, seconds: float, most: int, door: Door | None = None) -> type[Connection]:
    """Return the protocol with these limits, for ``uvicorn.Config(http=...)``.

    Args:
        seconds: of :class:`Connection`.
        most: likewise.
        door: likewise.

    Example:
        >>> protocol(seconds=1.5, most=10).seconds
        1.5
    """
    limits = {"seconds": seconds, "most": most, "door": None if door is None else staticmethod(door)}
    return type("Connection", (Connection,), limits)
