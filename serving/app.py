"""The HTTP interface: scores, health, metrics, and a description of itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST

from ctr_models.errors import RequestError, SluiceError
from serving.monitoring import Metrics, Observe, error_log
from serving.schemas import Problems, Refused, ScoreRequest, ScoreResponse, parse_request, refused_value
from serving.scorer import Scorer
from serving.settings import Settings

SCORE_PATH = "/v1/score"


def create_app(
    settings: Settings,
    *,
    on_ready: Callable[[Scorer], None] | None = None,
    on_failure: Callable[[Exception], None] | None = None,
) -> FastAPI:
    """Make the application. It answers at once, and scores as soon as its bundle is loaded and verified.

    Args:
        settings: of the deployment.
        on_ready: called once the bundle is ready.
        on_failure: called if it can't be loaded; the application then stays unready and says why.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.create_task(_load(app, settings, on_ready, on_failure))
        try:
            yield
        finally:
            await asyncio.gather(loading, return_exceptions=True)
            if app.state.scorer is not None:
                await asyncio.to_thread(app.state.scorer.close)

    app = FastAPI(title="Sluice", version=version("sluice"), lifespan=lifespan, redoc_url=None)
    app.state.scorer, app.state.reason = None, "the model is being loaded"
    app.state.metrics = Metrics()
    app.add_middleware(Observe, metrics=app.state.metrics)
    app.add_exception_handler(Refused, _refuse)
    _add_routes(app, settings)
    app.openapi = lambda: _describe(app)  # type: ignore[method-assign]
    return app


async def _load(
    app: FastAPI,
    settings: Settings,
    on_ready: Callable[[Scorer], None] | None,
    on_failure: Callable[[Exception], None] | None,
) -> None:
    try:
        scorer = await asyncio.to_thread(Scorer.load, settings)
    except Exception as error:
        known = isinstance(error, SluiceError)
        app.state.reason = str(error) if known else "the model could not be loaded; see the server's log"
        if not known:
            error_log.exception("the model could not be loaded")
        if on_failure is not None:
            on_failure(error)
        return
    app.state.metrics.serves(scorer.card)
    app.state.scorer = scorer
    if on_ready is not None:
        on_ready(scorer)


def _add_routes(app: FastAPI, settings: Settings) -> None:
    @app.post(
        SCORE_PATH,
        response_model=ScoreResponse,
        summary="Score the candidates of one request",
        responses={
            413: {"model": Problems, "description": "The body is too large"},
            422: {"model": Problems, "description": "The request is malformed; `loc` is the path of the field"},
            503: {"model": Problems, "description": "The model is not ready"},
        },
        openapi_extra={"requestBody": {"required": True, "content": {"application/json": {}}}},
    )
    async def score(request: Request) -> Any:
        """Raw values in, encoded by the definition that encoded the training data; probabilities out."""
        state = app.state
        scorer: Scorer | None = state.scorer
        if scorer is None:
            raise Refused.of(503, (), state.reason, "not_ready", headers={"Retry-After": "1"})
        body = await _read(request, settings.max_body_bytes)
        parsed = parse_request(body, max_candidates=settings.max_candidates)
        if parsed.request_id is not None:
            request.state.request_id = parsed.request_id
        request.state.candidates = len(parsed.candidates)
        try:
            scores = await scorer.score(parsed.user, parsed.context, parsed.candidates)
        except RequestError as error:
            raise refused_value(error, scorer.columns) from None
        state.metrics.candidates.inc(len(scores))
        return JSONResponse(
            {
                "scores": scores.tolist(),
                "model": scorer.card.model_dump(),
                "request_id": request.state.request_id,
            }
        )

    @app.get("/healthz", summary="The process is alive")
    async def healthz() -> dict[str, str]:
        return {"status": "alive"}

    @app.get(
        "/readyz", summary="A verified model is loaded", responses={503: {"description": "Not ready, and why"}}
    )
    async def readyz() -> Any:
        if app.state.scorer is None:
            content = {"status": "not ready", "reason": app.state.reason}
            return JSONResponse(content, status_code=503, headers={"Retry-After": "1"})
        return {"status": "ready", "model": app.state.scorer.card.model_dump()}

    @app.get("/metrics", summary="Prometheus metrics", response_class=Response)
    async def metrics() -> Response:
        return Response(app.state.metrics.exposition(), media_type=CONTENT_TYPE_LATEST)


async def _read(request: Request, limit: int) -> bytes:
    """The body, unless it is longer than allowed; no more than that is ever held."""
    declared = request.headers.get("content-length", "")
    parts: list[bytes] = []
    size = int(declared) if declared.isdigit() and int(declared) > limit else 0
    if not size:
        async for part in request.stream():
            size += len(part)
            if size > limit:
                break
            parts.append(part)
    if size > limit:
        # What was not read can't be skipped politely, so the connection ends with the answer.
        message = f"the body is larger than {limit:,} bytes; send fewer candidates a request"
        raise Refused.of(413, ("body",), message, "too_large", headers={"Connection": "close"})
    return b"".join(parts)


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    request.app.state.metrics.errors.labels(error.problems[0].type).inc()
    content = Problems(detail=error.problems, request_id=request.state.request_id).model_dump()
    return JSONResponse(content, status_code=error.status, headers=error.headers)


def _describe(app: FastAPI) -> dict[str, Any]:
    """OpenAPI, with an example from the golden rows once there is a model."""
    if app.openapi_schema is not None:
        return app.openapi_schema
    described = get_openapi(
        title=app.title,
        version=app.version,
        description="Click probabilities for the candidates of a request.",
        routes=app.routes,
    )
    schemas = described.setdefault("components", {}).setdefault("schemas", {})
    schemas["ScoreRequest"] = ScoreRequest.model_json_schema()
    route = described["paths"][SCORE_PATH]["post"]
    content = route["requestBody"]["content"]["application/json"]
    content["schema"] = {"$ref": "#/components/schemas/ScoreRequest"}
    scorer: Scorer | None = app.state.scorer
    if scorer is None:
        return described
    request = scorer.example()
    scores = scorer.bundle.score_request(**request).tolist()
    content["example"] = request
    route["responses"]["200"]["content"]["application/json"]["example"] = {
        "scores": scores,
        "model": scorer.card.model_dump(),
        "request_id": "4c1c0ab6d3a84f0c9a4c9f0f4c7f3b52",
    }
    app.openapi_schema = described
    return described
