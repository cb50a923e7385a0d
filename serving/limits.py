"""What is let in: how many requests and bytes at once, how large a body, of which type, and from where."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from serving.pace import Pace
from serving.schemas import Problems, Refused, overloaded

JSON, ARROW, BINARY = "application/json", "application/vnd.apache.arrow.stream", "application/octet-stream"
_READING = frozenset({"GET", "HEAD", "OPTIONS"})


@dataclass
class Intake:
    """The door of a server: it counts what is inside, and reads bodies within their limits.

    Args:
        requests: with a body, in hand at once.
        body_bytes: of one body.
        held_bytes: of all bodies in hand; each counts until its request is answered.
        wait_seconds: that the last request in hand may be expected to wait.

    Attributes:
        in_hand: requests that are being read or answered.
        reading: those of them whose body is not here yet: they wait for their clients, and nobody waits for them.
        pace: of the others; says how many there may be.
        held: bytes of their bodies.
    """

    requests: int
    body_bytes: int
    held_bytes: int
    wait_seconds: float = math.inf
    in_hand: int = field(default=0, init=False)
    reading: int = field(default=0, init=False)
    pace: Pace = field(init=False)
    held: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.pace = Pace(self.requests, self.wait_seconds)

    async def read(self, request: Request, types: tuple[str, ...] = (JSON,)) -> bytes:
        """Return the body of a request, as :meth:`take` does, without its type."""
        return (await self.take(request, types))[1]

    async def take(self, request: Request, types: tuple[str, ...]) -> tuple[str, bytes]:
        """Return the type and the body of a request; of one that is too large no more than is allowed is held.

        How long it may take to arrive is the business of :class:`serving.connections.Connection`.

        Args:
            request: with its headers; :class:`Admit` has let it in.
            types: that the body may have; one that names none is read as the first.

        Raises:
            Refused: 413 too large, 415 another type or an encoding, 503 too much is held already.
        """
        headers = headers_of(request.scope)
        kind = content_type(headers, types)
        if headers.get(b"content-encoding", b"identity").lower() != b"identity":
            message, plain = "send the body as it is, without Content-Encoding", {"Accept-Encoding": "identity"}
            raise Refused.of(415, _header("Content-Encoding"), message, "content_encoding", headers=plain)
        declared = headers.get(b"content-length", b"")
        if declared.isdigit() and (len(declared) > 18 or int(declared) > self.body_bytes):
            raise self._too_large()
        parts: list[bytes] = []
        size, more, state = 0, True, request.scope["state"]
        self.reading += 1
        try:
            while more:
                came = await request.receive()
                if came["type"] == "http.disconnect":
                    raise ClientDisconnect
                part, more = came.get("body", b""), came.get("more_body", False)
                size += len(part)
                self.held += len(part)
                state["held"] = size
                if size > self.body_bytes:
                    raise self._too_large()
                if self.held > self.held_bytes:
                    raise overloaded(1)
                parts.append(part)
        finally:
            self.reading -= 1
        self.pace.enter(time.perf_counter())
        state["read"] = True
        return kind, b"".join(parts)

    def _too_large(self) -> Refused:
        # What was not read can't be skipped politely, so the connection ends with the answer.
        message = f"the body is larger than {self.body_bytes:,} bytes; send fewer candidates a request"
        return Refused.of(413, ("body",), message, "too_large", headers={"Connection": "close"})


class Admit:
    """ASGI middleware: lets requests with a body in while there is room, unless a page of elsewhere sends them.

    Args:
        app: what answers.
        intake: counts.
        count: called with the type of a problem for which a request is turned away.
    """

    def __init__(self, app: ASGIApp, intake: Intake, count: Callable[[str], None]) -> None:
        self.app, self.intake, self._count = app, intake, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in _READING:
            await self.app(scope, receive, send)
            return
        intake = self.intake
        refused = cross_origin(scope)
        if refused is None and intake.in_hand >= intake.requests:
            refused = overloaded(0)
        if refused is not None:
            self._count(refused.problems[0].type)
            await refusal(refused, scope, close=True)(scope, receive, send)
            return
        intake.in_hand += 1
        state = scope["state"]
        try:
            await self.app(scope, receive, send)
        except ClientDisconnect:
            state["unserved"] = True
            raise
        finally:
            intake.in_hand -= 1
            if "read" in state:
                intake.pace.leave(time.perf_counter(), served="unserved" not in state)
            intake.held -= state.get("held", 0)


def headers_of(scope: Scope) -> Mapping[bytes, bytes]:
    """Return the headers of a request, by their names in lower case; of one that came several times the first.

    Example:
        >>> headers_of({"headers": [(b"accept", b"text/html"), (b"accept", b"*/*")]})
        {b'accept': b'text/html'}
    """
    state = scope.setdefault("state", {})
    found: dict[bytes, bytes] | None = state.get("headers")
    if found is None:
        found = state["headers"] = dict(reversed(scope["headers"]))
    return found


def cross_origin(scope: Scope) -> Refused | None:
    """Return the refusal of a request that a web page of another origin makes its reader's browser send.

    Browsers say where such requests come from, and send simple ones without asking; no other client does.

    Example:
        >>> page = [(b"origin", b"https://elsewhere.example"), (b"host", b"localhost:8000")]
        >>> cross_origin({"headers": page}).status, cross_origin({"headers": page[1:]})
        (403, None)
    """
    headers = headers_of(scope)
    site, origin = headers.get(b"sec-fetch-site"), headers.get(b"origin")
    if site is None and origin is None:
        return None
    if site is not None:
        same = site in (b"same-origin", b"none")
    else:
        assert origin is not None
        same = _place(origin) == headers.get(b"host")
    if same:
        return None
    return Refused.of(403, _header("Origin"), "pages of other origins may not call this server", "cross_origin")


def content_type(headers: Mapping[bytes, bytes], types: tuple[str, ...]) -> str:
    """Return the type of a body, without its parameters; the first of ``types`` if it names none.

    Raises:
        Refused: 415, it is none of them, or text that is not UTF-8.

    Example:
        >>> content_type({b"content-type": b"Application/JSON; charset=utf-8"}, (JSON,))
        'application/json'
    """
    given = headers.get(b"content-type")
    if given is None:
        return types[0]
    kind = given.decode("latin-1")
    if kind in types:
        return kind
    kind, _, parameters = kind.partition(";")
    kind, parameters = kind.strip().lower(), parameters.lower().replace('"', "").replace(" ", "")
    if kind in types and (not parameters.startswith("charset=") or parameters in ("charset=utf-8", "charset=utf8")):
        return kind
    message = f"send {' or '.join(types)}" + (" in UTF-8" if kind in types else "")
    raise Refused.of(415, _header("Content-Type"), message, "content_type")


def refusal(error: Refused, scope: Scope, *, close: bool = False) -> JSONResponse:
    """Return the answer that tells of a refusal, in the words of the protocol that the path belongs to.

    Args:
        error: what is wrong.
        scope: of the request.
        close: the body was not read and can't be skipped politely, so the connection ends with the answer.
    """
    content: dict[str, Any] = Problems(detail=error.problems, request_id=scope["state"]["request_id"]).model_dump()
    if scope["path"].startswith("/v2"):
        content["error"] = error.problems[0].msg
    headers = error.headers | ({"Connection": "close"} if close else {})
    return JSONResponse(content, status_code=error.status, headers=headers)


def _header(name: str) -> tuple[str, str]:
    return "header", name


def _place(origin: bytes) -> bytes:
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return b""
