"""The outermost layer of a request: its id, its cost, its line in the log, and nothing of the inside outward."""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import MutableMapping
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.busy_poll import BusyPoll
from serving.limits import headers_of
from serving.logs import Record, Sampler
from serving.monitoring import Metrics
from serving.schemas import REQUEST_ID
from serving.stages import Stages
from serving.tracing import Tracing

access_log = logging.getLogger("sluice.access")
error_log = logging.getLogger("sluice.error")
_REQUEST_ID = re.compile(REQUEST_ID.encode())


class Observe:
    """ASGI middleware: gives every request an id, measures it, logs it, and hides what went wrong inside.

    Args:
        app: what is observed.
        metrics: that count it.
        sampler: says which requests get a line.
        tracing: that gets its spans; None: nobody does.
        busy_poll: that is told when it begins and ends; None: the event loop sleeps whenever it can.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        sampler: Sampler | None = None,
        tracing: Tracing | None = None,
        busy_poll: BusyPoll | None = None,
    ) -> None:
        self.app, self.metrics, self.tracing, self.busy_poll = app, metrics, tracing, busy_poll
        self.sampler = sampler or Sampler(1.0)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begin = time.perf_counter()
        if self.busy_poll is not None:
            self.busy_poll.begin(begin)
        state: MutableMapping[str, Any] = scope.setdefault("state", {})
        given = headers_of(scope).get(b"x-request-id", b"")
        state["arrived"] = begin
        state["stages"] = Stages(begin)
        state["request_id"] = given.decode() if _REQUEST_ID.fullmatch(given) else secrets.token_hex(16)
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", state["request_id"].encode())]
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except ClientDisconnect:
            status = 499  # nginx's number for a client that did not wait; nobody is left to answer
        except Exception:
            error_log.exception("a request failed", extra={"fields": {"request_id": state["request_id"]}})
            self.metrics.errors.labels("internal").inc()
            if status:  # the answer has begun; all that is left is to break it off
                raise
            content = {"detail": "internal error", "request_id": state["request_id"]}
            await JSONResponse(content, status_code=500)(scope, receive, send_with_id)
        finally:
            end = time.perf_counter()
            if self.busy_poll is not None:
                self.busy_poll.end(end)
            self._record(scope, state, status, end - begin)

    def _record(self, scope: Scope, state: MutableMapping[str, Any], status: int, seconds: float) -> None:
        # Paths that no route matches share one label, or a scanner would fill the registry.
        route = getattr(scope.get("route"), "path", "other")
        stages: Stages = state["stages"]
        self.metrics.answered(route, status, seconds, stages)
        trace = None
        if self.tracing is not None:
            trace = self.tracing.record(scope, route, status, state["request_id"], seconds, stages)
        if status < 500 and not self.sampler.takes(state["request_id"]):
            return
        if not access_log.isEnabledFor(logging.INFO):
            return
        line = {
            "request_id": state["request_id"],
            "method": scope["method"],
            "route": route,
            "status": status,
            "ms": round(seconds * 1000, 2),
        }
        for name in ("candidates", "key"):
            if name in state:
                line[name] = state[name]
        if trace is not None:
            line["trace_id"] = trace
        access_log.handle(Record(access_log.name, "request", line))
