"""The HTTP interface: scores, health, metrics, and a description of itself."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from importlib.metadata import version
from typing import Annotated, Any

import msgspec
from fastapi import FastAPI, Header, Query, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST

from serving import event_routes, open_inference
from serving.batching import Batcher, Limits
from serving.limits import BINARY, JSON, Admit, Intake, refusal
from serving.logs import Sampler
from serving.models import Models
from serving.monitoring import Metrics
from serving.observe import Observe
from serving.online_features import OnlineFeatures, open_features, status_for
from serving.openapi import SCORE_PATH, describe
from serving.schemas import Problems, Refused, ScoreResponse, parse_request
from serving.scoring import Scoring
from serving.security import Guard, Keyring
from serving.settings import Settings
from serving.tracing import Tracing
from serving.traffic import Traffic

_encode = msgspec.json.Encoder().encode


def create_app(
    settings: Settings,
    *,
    on_ready: Callable[[Models], None] | None = None,
    on_failure: Callable[[Exception], None] | None = None,
) -> FastAPI:
    """Make the application. It answers at once, and scores as soon as its bundles are loaded and verified.

    ``app.state`` holds the :class:`Models`, the :class:`Batcher` and the :class:`Metrics` that routes share.

    Args:
        settings: of the deployment.
        on_ready: called once every slot has its bundle.
        on_failure: called if one can't be loaded; the application then stays unready and says why.
    """
    metrics = Metrics()

    def refused(slot: str, reason: str) -> None:
        metrics.refuses(slot)

    features = _features(settings)
    if features is not None:
        metrics.features_up.set_function(lambda: features.stored is not None)
    models = Models(settings, on_swap=metrics.serves, on_refusal=refused)
    batcher = Batcher(_limits(settings), on_pass=metrics.passed)
    metrics.waiting.set_function(lambda: batcher.waiting_rows)
    traffic = None if settings.events_url is None else Traffic(settings, models, batcher)
    if traffic is not None:
        metrics.watch_store(traffic.store)
    tracing = (
        None if settings.otlp_endpoint is None else Tracing(settings.otlp_endpoint, share=settings.trace_share)
    )

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        living = asyncio.create_task(_live(models, features, on_ready, on_failure))
        following = [asyncio.create_task(one.watch()) for one in (features, traffic) if one is not None]
        try:
            yield
        finally:
            tasks = [living, *following]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for one in (features, traffic):
                if one is not None:
                    await one.close()
            await asyncio.to_thread(models.close)
            await asyncio.to_thread(batcher.close)
            if tracing is not None:
                await asyncio.to_thread(tracing.close)

    app = FastAPI(title="Sluice", version=version("sluice"), lifespan=lifespan, redoc_url=None)
    app.state.models, app.state.batcher, app.state.metrics = models, batcher, metrics
    app.state.features, app.state.traffic = features, traffic
    keys = None if settings.keys is None else Keyring(settings.keys)
    intake = _intake(settings)
    app.add_middleware(Admit, intake=intake, count=lambda kind: metrics.errors.labels(kind).inc())
    app.add_middleware(Guard, keys=keys, metrics=metrics)
    app.add_middleware(Observe, metrics=metrics, sampler=Sampler(settings.log_requests), tracing=tracing)
    app.add_exception_handler(Refused, _refuse)
    _add_routes(app, settings, intake)
    tensors = partial(intake.read, types=(JSON, BINARY))
    open_inference.add_routes(app, models, batcher, tensors, max_rows=settings.max_candidates)
    if traffic is not None:
        event_routes.add_routes(app, traffic, intake.read)
    app.openapi = lambda: describe(app)  # type: ignore[method-assign]
    return app


def _limits(settings: Settings) -> Limits:
    return Limits(
        rows=settings.batch_rows,
        milliseconds=settings.batch_ms,
        queue_rows=settings.queue_rows,
        queue_milliseconds=settings.queue_ms,
        threads=settings.workers,
        inline_milliseconds=settings.inline_ms,
    )


def _intake(settings: Settings) -> Intake:
    return Intake(
        requests=settings.max_requests,
        body_bytes=settings.max_body_bytes,
        held_bytes=settings.held_bytes,
        seconds=settings.receive_seconds,
    )


def _features(settings: Settings) -> OnlineFeatures | None:
    if settings.features is None:
        return None
    return open_features(settings.features, timeout_seconds=settings.features_timeout_ms / 1000)


async def _live(
    models: Models,
    features: OnlineFeatures | None,
    on_ready: Callable[[Models], None] | None,
    on_failure: Callable[[Exception], None] | None,
) -> None:
    """Load the models, then watch for new ones."""
    try:
        if features is not None:
            await features.refresh()
        await models.load()
    except Exception as error:
        if on_failure is not None:
            on_failure(error)
        return
    if on_ready is not None:
        on_ready(models)
    await models.watch()


def _add_routes(app: FastAPI, settings: Settings, intake: Intake) -> None:
    models: Models = app.state.models
    batcher: Batcher = app.state.batcher
    metrics: Metrics = app.state.metrics
    features: OnlineFeatures | None = app.state.features
    traffic: Traffic | None = app.state.traffic
    scoring = Scoring(models, batcher, metrics, features, traffic)

    @app.post(
        SCORE_PATH,
        response_model=ScoreResponse,
        summary="Score the candidates of one request",
        responses={
            404: {"model": Problems, "description": "No such model"},
            422: {"model": Problems, "description": "The request is malformed; `loc` is the path of the field"},
            503: {"model": Problems, "description": "The model is not ready, or the server at its capacity"},
            504: {"model": Problems, "description": "The deadline passed before the request's turn came"},
        },
        openapi_extra={"requestBody": {"required": True, "content": {"application/json": {}}}},
    )
    async def score(
        request: Request,
        model: Annotated[str | None, Query(description="The slot whose model shall answer.")] = None,
        x_deadline_ms: Annotated[
            str | None, Header(description="Milliseconds after which the answer is of no use any more.")
        ] = None,
    ) -> Any:
        """Raw values in, encoded by the definition that encoded the training data; probabilities out."""
        models.scorer(model)  # before a body is read that nobody can answer
        state = request.state
        deadline = _deadline(x_deadline_ms, state.arrived)
        body = await intake.read(request)
        state.stages.end("read")
        asked = parse_request(body, max_candidates=settings.max_candidates)
        if asked.request_id is not None:
            state.request_id = asked.request_id
        state.candidates = len(asked.candidates)
        found = await scoring.answer(
            asked,
            slot=asked.model or model,
            request_id=state.request_id,
            deadline=deadline,
            stages=state.stages,
        )
        response = Response(_encode(found.content()), media_type="application/json")
        state.stages.end("reply")
        return response

    @app.get("/healthz", summary="The process is alive")
    async def healthz() -> dict[str, str]:
        return {"status": "alive"}

    @app.get(
        "/readyz",
        summary="Every slot has a verified model",
        responses={503: {"description": "Not ready, and why"}},
    )
    async def readyz() -> Any:
        told = models.status()
        if not models.ready:
            reason = next((slot["problem"] for slot in told if "problem" in slot), "the model is being loaded")
            content = {"status": "not ready", "reason": reason, "models": told}
            return JSONResponse(content, status_code=503, headers={"Retry-After": "1"})
        content = {"status": "ready", "model": models.scorer().card.model_dump(), "models": told}
        if features is not None:
            scorers = {name: slot.scorer for name, slot in models.slots.items() if slot.scorer is not None}
            content["features"] = status_for(features, {n: s.bundle.state.spec for n, s in scorers.items()})
        if traffic is not None:
            content["events"] = vars(traffic.store.status)
        return content

    @app.get("/v1/models", summary="What answers in each slot")
    async def list_models() -> dict[str, Any]:
        return {"models": models.status()}

    @app.get("/metrics", summary="Prometheus metrics", response_class=Response)
    async def exposition() -> Response:
        return Response(metrics.exposition(), media_type=CONTENT_TYPE_LATEST)


def _deadline(given: str | None, arrived: float) -> float:
    """Return the time by ``time.perf_counter()`` until which an answer is of use."""
    if given is None:
        return math.inf
    try:
        milliseconds = float(given)
    except ValueError:
        milliseconds = math.nan
    if not milliseconds > 0:
        message = f"expected milliseconds, a number above 0, got {given[:40]!r}"
        raise Refused.of(422, ("header", "X-Deadline-Ms"), message, "deadline")
    return arrived + milliseconds / 1000


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    request.app.state.metrics.errors.labels(error.problems[0].type).inc()
    return refusal(error, request.scope)
