"""What can be seen from outside: Prometheus metrics, request ids and one log line a request."""

from __future__ import annotations

import json
import logging
import re
import time
import uuid
from collections.abc import MutableMapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.schemas import ModelCard, StoredFeatures

access_log = logging.getLogger("sluice.access")
error_log = logging.getLogger("sluice.error")

_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_ROWS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
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
            "sluice_model_info",
            "The models that answer.",
            ["slot", "name", "version", "hash"],
            registry=self.registry,
        )
        self.loads = Counter(
            "sluice_model_loads_total",
            "Bundles that came to answer (swapped) or were refused.",
            ["slot", "result"],
            registry=self.registry,
        )
        self.pass_rows = Histogram(
            "sluice_pass_rows", "Candidates of a forward pass.", buckets=_ROWS, registry=self.registry
        )
        self.pass_requests = Histogram(
            "sluice_pass_requests", "Requests that share a forward pass.", buckets=_ROWS, registry=self.registry
        )
        self.waited = Histogram(
            "sluice_queue_seconds", "What a request waits for its pass.", buckets=_BUCKETS, registry=self.registry
        )
        self.waiting = Gauge("sluice_queue_rows", "Candidates that wait for a pass.", registry=self.registry)
        self.features_up = Gauge(
            "sluice_features_up", "Whether the online feature store answers.", registry=self.registry
        )
        self.features_seconds = Histogram(
            "sluice_features_seconds",
            "Looking up the features of a request.",
            buckets=(0.0001, 0.00025, 0.0005, *_BUCKETS),
            registry=self.registry,
        )
        self.features_missing = Counter(
            "sluice_features_missing_total",
            "Users and items that were asked for and are not stored.",
            ["of"],
            registry=self.registry,
        )
        self._cards: dict[str, tuple[str, ...]] = {}

    def serves(self, slot: str, card: ModelCard) -> None:
        """Record which model answers in a slot from now on."""
        if slot in self._cards:
            self.model.remove(*self._cards[slot])
        version = "" if card.version is None else str(card.version)
        self._cards[slot] = (slot, card.name, version, card.hash)
        self.model.labels(*self._cards[slot]).set(1)
        self.loads.labels(slot, "swapped").inc()

    def refuses(self, slot: str) -> None:
        """Record that a bundle was refused."""
        self.loads.labels(slot, "refused").inc()

    def passed(self, requests: int, rows: int, waited: Sequence[float]) -> None:
        """Record a forward pass, and what each of its requests waited for it."""
        self.pass_requests.observe(requests)
        self.pass_rows.observe(rows)
        for seconds in waited:
            self.waited.observe(seconds)

    def looked_up(self, seconds: float, stored: StoredFeatures) -> None:
        """Record what the online feature store gave for a request."""
        self.features_seconds.observe(seconds)
        self.features_missing.labels("user").inc(stored.missing.user)
        self.features_missing.labels("item").inc(len(stored.missing.items))

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
        state["arrived"] = begin
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
