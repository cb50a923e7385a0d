"""What can be seen from outside: Prometheus metrics, request ids and one log line a request."""

from __future__ import annotations

import json
import logging
import re
import time
import uuid
from collections.abc import MutableMapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.schemas import ModelCard

access_log = logging.getLogger("sluice.access")
error_log = logging.getLogger("sluice.error")

_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


class Metrics:
    """The metrics of one application, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "sluice_requests_total", "Requests answered.", ["route", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "sluice_request_seconds",
            "From the first byte of a request to the last of its answer.",
            ["route"],
            buckets=_BUCKETS,
            registry=self.registry,
        )
        self.candidates = Counter("sluice_candidates_total", "Candidates scored.", registry=self.registry)
        self.errors = Counter(
            "sluice_errors_total", "Requests refused or failed, by reason.", ["reason"], registry=self.registry
        )
        self.model = Gauge(
            "sluice_model_info", "The model that answers.", ["name", "version", "hash"], registry=self.registry
        )

    def serves(self, card: ModelCard) -> None:
        """Record which model answers from now on."""
        self.model.clear()
        self.model.labels(card.name, "" if card.version is None else str(card.version), card.hash).set(1)

    def exposition(self) -> bytes:
        """Return Prometheus' text format."""
        return generate_latest(self.registry)


class Observe:
    """ASGI middleware: gives every request an id, measures it, logs it, and hides what went wrong inside."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begin = time.perf_counter()
        given = Headers(scope=scope).get("x-request-id", "")
        state: MutableMapping[str, Any] = scope.setdefault("state", {})
        state["request_id"] = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = state["request_id"]
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except ClientDisconnect:
            status = 499  # nginx's number for a client that did not wait; nobody is left to answer
        except Exception:
            error_log.exception("request %s failed", state["request_id"])
            self.metrics.errors.labels("internal").inc()
            if status:  # the answer has begun; all that is left is to break it off
                raise
            content = {"detail": "internal error", "request_id": state["request_id"]}
            await JSONResponse(content, status_code=500)(scope, receive, send_with_id)
        finally:
            self._record(scope, state, status, time.perf_counter() - begin)

    def _record(self, scope: Scope, state: MutableMapping[str, Any], status: int, seconds: float) -> None:
        # Paths that no route matches share one label, or a scanner would fill the registry.
        route = getattr(scope.get("route"), "path", "other")
        self.metrics.requests.labels(route, str(status)).inc()
        self.metrics.seconds.labels(route).observe(seconds)
        line = {
            "request_id": state["request_id"],
            "method": scope["method"],
            "route": route,
            "status": status,
            "ms": round(seconds * 1000, 2),
        }
        if "candidates" in state:
            line["candidates"] = state["candidates"]
        access_log.info(json.dumps(line))
