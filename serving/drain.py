"""The end of a server: what was accepted is finished, what is new is sent elsewhere."""

from __future__ import annotations

from collections.abc import Callable

from starlette.types import ASGIApp, Receive, Scope, Send

from serving.limits import refusal
from serving.schemas import Refused

ANSWERED = frozenset({"/healthz", "/readyz", "/metrics", "/v2/health/live"})
"""Paths that are answered to the last: whoever watches the server asks them."""


class Drain:
    """The requests in hand, and whether new ones are still taken.

    Attributes:
        in_hand: requests that are being answered, whatever they ask for.
        begun: whether new ones are refused.
    """

    def __init__(self) -> None:
        self.in_hand = 0
        self.begun = False

    def begin(self) -> None:
        """Take no more."""
        self.begun = True


class Draining:
    """ASGI middleware: counts requests, and refuses new ones with 503 once a drain has begun.

    Args:
        app: what answers.
        drain: of the application.
        count: called with the type of the problem for which a request is turned away.
    """

    def __init__(self, app: ASGIApp, drain: Drain, count: Callable[[str], None]) -> None:
        self.app, self.drain, self._count = app, drain, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if self.drain.begun and scope["path"] not in ANSWERED:
            self._count("draining")
            error = Refused.of(503, (), "the server is stopping", "draining", headers={"Retry-After": "1"})
            await refusal(error, scope, close=True)(scope, receive, send)
            return
        self.drain.in_hand += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self.drain.in_hand -= 1
