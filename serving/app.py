"""The HTTP interface: scores, health, metrics, and a description of itself."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from fastapi.telemetry import TelemetryConfig
from prometheus_client import CONTENT_TYPE_LATEST

from serving import event_routes, open_inference, score_routes, ui
from serving.batching import Batcher, Limits
from serving.busy_poll import BusyPoll
from serving.database import Database
from serving.direct import Direct
from serving.door import Door
from serving.drain import Drain, Draining
from serving.limits import BINARY, JSON, Admit, Intake, refusal
from serving.logs import Sampler
from serving.models import Models
from serving.monitoring import Metrics
from serving.observe import Observe
from serving.online_features import OnlineFeatures, open_features
from serving.openapi import BATCH_PATH, SCORE_PATH, describe
from serving.outcomes import Outcomes
from serving.readiness import readiness
from serving.schemas import Refused
from serving.scoring import Scoring
from serving.security import Guard, Keyring
from serving.settings import Settings
from serving.siblings import Place, Siblings
from serving.tracing import Tracing
from serving.traffic import Traffic

log = logging.getLogger("sluice.server")
BUSIEST = (SCORE_PATH, event_routes.PATH, BATCH_PATH, *open_inference.INFER_PATHS)
"""What is asked so often by POST that FastAPI's way to it would be felt."""
_SILENT: TelemetryConfig = {"tracing": False, "metrics": False, "logs": False}
"""Traces and metrics are of :class:`Tracing` and :class:`Metrics`; FastAPI makes none besides."""


def create_app(
    settings: Settings,
    *,
    on_ready: Callable[[Models], None] | None = None,
    on_failure: Callable[[Exception], None] | None = None,
    place: Place | None = None,
) -> FastAPI:
    """Make the application. It answers at once, and scores as soon as its bundles are loaded and verified.

    ``app.state`` holds the :class:`Models`, the :class:`Batcher` and the :class:`Metrics` that routes share.

    Args:
        settings: of the deployment.
        on_ready: called once every slot has its bundle.
        on_failure: called if one can't be loaded; the application then stays unready and says why.
        place: among other workers of the server; the application then begins when its bundles are loaded.
    """
    metrics = Metrics()

    def refused(slot: str, reason: str) -> None:
        metrics.refuses(slot)

    features = _features(settings)
    if features is not None:
        metrics.features_up.set_function(lambda: features.stored is not None)
    models = Models(settings, on_swap=metrics.serves, on_refusal=refused)
    batcher = Batcher(_limits(settings), on_pass=metrics.passed, on_failure=metrics.pass_failures.inc)
    metrics.waiting.set_function(lambda: batcher.waiting_rows)
    traffic = None if settings.events_url is None else Traffic(settings, models, batcher)
    if traffic is not None:
        metrics.watch_store(traffic.store)
    # A connection of its own: what it looks up keeps nobody waiting.
    outcomes = None if settings.events_url is None else Outcomes(Database(settings.events_url), metrics.outcomes)
    drain = Drain()
    siblings = None if place is None else Siblings(place, metrics)
    metrics.in_hand.set_function(lambda: drain.in_hand)

    tracing = (
        None if settings.otlp_endpoint is None else Tracing(settings.otlp_endpoint, share=settings.trace_share)
    )

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        loaded = asyncio.Event()
        living = asyncio.create_task(_live(models, features, siblings, loaded, on_ready, on_failure))
        following = [asyncio.create_task(one.watch()) for one in (features, traffic, outcomes) if one is not None]
        tasks = [living, *following]
        for task in tasks:
            task.add_done_callback(_ended)
        try:
            if siblings is not None:
                await loaded.wait()
            yield
        finally:
            if siblings is not None:
                await siblings.close()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for one in (features, traffic):
                if one is not None:
                    await one.close()
            if outcomes is not None:
                await asyncio.to_thread(outcomes.close)
            await asyncio.to_thread(models.close)
            await asyncio.to_thread(batcher.close)
            if tracing is not None:
                await asyncio.to_thread(tracing.close)

    app = FastAPI(title="Sluice", version=version("sluice"), lifespan=lifespan, redoc_url=None, telemetry=_SILENT)
    app.state.models, app.state.batcher, app.state.metrics = models, batcher, metrics
    app.state.features, app.state.traffic, app.state.drain = features, traffic, drain
    app.state.siblings = siblings
    keys = None if settings.keys is None else Keyring(settings.keys)
    intake = _intake(settings)
    app.state.door = Door(intake, metrics.turned_away)
    app.add_exception_handler(Refused, _refuse)
    _add_routes(app)
    scoring = Scoring(models, batcher, metrics, features, traffic)
    score_routes.add_routes(app, scoring, intake, settings)
    tensors = partial(intake.read, types=(JSON, BINARY))
    open_inference.add_routes(app, scoring, tensors, max_rows=settings.max_candidates)
    if traffic is not None:
        assert outcomes is not None
        event_routes.add_routes(app, traffic, intake.read, outcomes.took)
    ui.add_routes(app, lambda: readiness(models, features, traffic, drain), traffic)
    posts = {route.path: route for route in app.routes if isinstance(route, APIRoute) and route.methods == {"POST"}}
    busiest = [posts[path] for path in BUSIEST if path in posts]
    app.add_middleware(Direct, routes=busiest, refuse=_refuse)
    app.add_middleware(Admit, intake=intake, count=lambda kind: metrics.errors.labels(kind).inc())
    app.add_middleware(Guard, keys=keys, metrics=metrics, folder=None if place is None else place.folder)
    app.add_middleware(Draining, drain=drain, count=lambda kind: metrics.errors.labels(kind).inc())
    polling = BusyPoll(settings.busy_poll_ms / 1000) if settings.busy_poll_ms else None
    app.add_middleware(
        Observe, metrics=metrics, sampler=Sampler(settings.log_requests), tracing=tracing, busy_poll=polling
    )
    stack = app.build_middleware_stack
    app.build_middleware_stack = lambda: _within(stack())  # type: ignore[method-assign]
    app.openapi = lambda: describe(app, examples=keys is None)  # type: ignore[method-assign]
    return app


def _within(stack: Any) -> Observe:
    """Return what is within FastAPI's outermost layers: they wait for errors, and Observe lets none out."""
    while not isinstance(stack, Observe):
        stack = stack.app
    return stack


def _limits(settings: Settings) -> Limits:
    return Limits(
        rows=settings.batch_rows,
        milliseconds=settings.batch_ms,
        queue_rows=settings.queue_rows,
        queue_milliseconds=settings.queue_ms,
        threads=settings.threads,
        inline_milliseconds=settings.inline_ms,
    )


def _intake(settings: Settings) -> Intake:
    return Intake(
        requests=settings.max_requests,
        body_bytes=settings.max_body_bytes,
        held_bytes=settings.held_bytes,
        wait_seconds=settings.queue_ms / 1000,
    )


def _features(settings: Settings) -> OnlineFeatures | None:
    if settings.features is None:
        return None
    return open_features(settings.features, timeout_seconds=settings.features_timeout_ms / 1000)


def _ended(task: asyncio.Task[None]) -> None:
    """Tell of a task that should never fail, or what it follows would silently stand still."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("the server follows no longer what %s does", task.get_coro().__qualname__, exc_info=error)  # type: ignore[union-attr]


async def _live(
    models: Models,
    features: OnlineFeatures | None,
    siblings: Siblings | None,
    loaded: asyncio.Event,
    on_ready: Callable[[Models], None] | None,
    on_failure: Callable[[Exception], None] | None,
) -> None:
    """Load the models, then watch for new ones."""
    try:
        if features is not None:
            await features.refresh()
        await models.load()
        if siblings is not None:
            await siblings.open()
    except Exception as error:
        if on_failure is not None:
            on_failure(error)
        return
    finally:
        loaded.set()
    if on_ready is not None:
        on_ready(models)
    await models.watch()


def _add_routes(app: FastAPI) -> None:
    models: Models = app.state.models
    metrics: Metrics = app.state.metrics
    features: OnlineFeatures | None = app.state.features
    traffic: Traffic | None = app.state.traffic

    @app.get("/healthz", summary="The process is alive")
    async def healthz() -> dict[str, str]:
        return {"status": "alive"}

    @app.get(
        "/readyz",
        summary="Every slot has a verified model",
        responses={503: {"description": "Not ready, and why"}},
    )
    async def readyz() -> Any:
        status, content = readiness(models, features, traffic, app.state.drain)
        return JSONResponse(content, status_code=status, headers={} if status == 200 else {"Retry-After": "1"})

    @app.get("/v1/models", summary="What answers in each slot")
    async def list_models() -> dict[str, Any]:
        return {"models": models.status()}

    @app.get("/metrics", summary="Prometheus metrics", response_class=Response)
    async def exposition() -> Response:
        siblings: Siblings | None = app.state.siblings
        told = metrics.exposition() if siblings is None else await siblings.exposition()
        return Response(told, media_type=CONTENT_TYPE_LATEST)


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    request.app.state.metrics.errors.labels(error.problems[0].type).inc()
    if error.status in (503, 504):
        request.state.unserved = True
    return refusal(error, request.scope)
