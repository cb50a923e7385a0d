"""The server's description of itself: every status that it may answer, and an example that works."""

from __future__ import annotations

from typing import Any

import polars as pl
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from pipelines.features.canonical import MAX_TEXT
from serving.models import Models
from serving.schemas import BatchRequest, Problems, ScoreRequest
from serving.scorer import Scorer
from serving.security import OPEN

SCORE_PATH, BATCH_PATH = "/v1/score", "/v1/score:batch"
_PROBLEMS = {"application/json": {"schema": {"$ref": "#/components/schemas/Problems"}}}
GUARDED = {
    401: "No key, or a wrong one",
    403: "The key lacks the scope, or a web page of another origin asks",
    429: "More requests than the key may send, or too many wrong keys; `Retry-After` says when to come back",
}
"""What may be answered wherever a key is needed."""
WITH_BODY = {
    403: "A web page of another origin asks",
    408: "The body did not arrive in time",
    413: "The body is too large",
    415: "The body is of a type, or in an encoding, that is not taken",
    503: "The server is at its capacity; `Retry-After` says when to come back",
}
"""What may be answered wherever a body is read."""
ALWAYS = {
    400: "This is no HTTP/1.1 request",
    408: "The head of the request did not arrive in time",
    429: "Too many requests were sent ahead of their answers",
    431: "The head of the request is too large",
    500: "An error inside; the server's log tells of it under the request's id",
}
"""What may be answered to anything."""


def describe(app: FastAPI, *, examples: bool) -> dict[str, Any]:
    """Return OpenAPI; once there is a model, with its columns.

    Args:
        app: the application.
        examples: show golden rows as an example: they are rows of the data, and the document needs no key.
    """
    if app.openapi_schema is not None:
        return app.openapi_schema
    described = get_openapi(
        title=app.title,
        version=app.version,
        description="Click probabilities for the candidates of a request.",
        routes=app.routes,
    )
    schemas = described.setdefault("components", {}).setdefault("schemas", {})
    for model in (ScoreRequest, BatchRequest, Problems):
        schemas[model.__name__] = model.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= schemas[model.__name__].pop("$defs", {})
    for path, operations in described["paths"].items():
        for method, operation in operations.items():
            may = {**ALWAYS, **(WITH_BODY if method == "post" else {}), **({} if path in OPEN else GUARDED)}
            for status, text in may.items():
                operation["responses"].setdefault(str(status), {"description": text, "content": _PROBLEMS})
    batch = described["paths"][BATCH_PATH]["post"]["requestBody"]["content"]["application/json"]
    batch["schema"] = {"$ref": "#/components/schemas/BatchRequest"}
    route = described["paths"][SCORE_PATH]["post"]
    content = route["requestBody"]["content"]["application/json"]
    content["schema"] = {"$ref": "#/components/schemas/ScoreRequest"}
    models: Models = app.state.models
    _name_slots(described, list(models.slots))
    if not models.ready:
        return described
    scorer = models.scorer()
    record = {"properties": _columns(scorer), "additionalProperties": len(models.slots) > 1}
    parts = schemas["ScoreRequest"]["properties"]
    for part in (parts["user"], parts["context"], parts["candidates"]["items"]):
        part |= record
    if examples:
        request = scorer.example
        (scores,) = scorer.run([scorer.encode(**request)])
        content["example"], batch["example"] = request, {"requests": [request, request]}
        route["responses"]["200"]["content"]["application/json"]["example"] = {
            "scores": scores.tolist(),
            "model": scorer.card.model_dump(),
            "request_id": "4c1c0ab6d3a84f0c9a4c9f0f4c7f3b52",
        }
    app.openapi_schema = described
    return described


def _name_slots(described: dict[str, Any], slots: list[str]) -> None:
    """Say which models there are wherever one is named."""
    for path, operations in described["paths"].items():
        for operation in operations.values():
            for parameter in operation.get("parameters", ()):
                if parameter["name"] == "model" or (path.startswith("/v2/") and parameter["name"] == "name"):
                    parameter["schema"] = {"type": "string", "enum": slots}


def _columns(scorer: Scorer) -> dict[str, Any]:
    """Return the schema of each raw column of a model."""
    return {name: {"anyOf": [_values(kind), {"type": "null"}]} for name, kind in scorer.inputs.items()}


def _values(kind: pl.DataType) -> dict[str, Any]:
    if isinstance(kind, pl.List):
        return {"type": "array", "items": _values(kind.inner)}  # type: ignore[arg-type]
    if kind.is_integer():
        return {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}
    return {"type": "number"} if kind.is_float() else {"type": "string", "maxLength": MAX_TEXT}
