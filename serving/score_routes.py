"""Routes of scoring: one request, or many; as JSON or Arrow."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response

from serving import arrow
from serving.aside import aside
from serving.deadline import DEADLINE, PARAMETER, PASSED, deadline_of
from serving.limits import ARROW, JSON, Intake, headers_of
from serving.line import line_of
from serving.openapi import BATCH_PATH, SCORE_PATH
from serving.schemas import BatchResponse, Problems, Question, Refused, ScoreResponse, parse_batch, parse_request
from serving.scoring import Answer, Scoring
from serving.settings import Settings

TYPES = (JSON, ARROW)
_encode = msgspec.json.Encoder().encode
_BINARY = {"schema": {"type": "string", "format": "binary"}}
_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"content": {ARROW: _BINARY}},
    404: {"model": Problems, "description": "No such model"},
    422: {"model": Problems, "description": "The request is malformed; `loc` is the path of the field"},
    503: {"model": Problems, "description": "The model is not ready, or the server at its capacity"},
    504: {"model": Problems, "description": PASSED},
}
_MODEL = {
    "name": "model",
    "in": "query",
    "required": False,
    "schema": {"type": "string"},
    "description": "The slot whose model shall answer.",
}
_READ: dict[str, Any] = {
    "parameters": [_MODEL, PARAMETER],
    "requestBody": {"required": True, "content": {JSON: {}, ARROW: _BINARY}},
}
"""What the endpoints read of a request themselves."""


def add_routes(app: FastAPI, scoring: Scoring, intake: Intake, settings: Settings) -> None:
    """Add ``/v1/score`` and ``/v1/score:batch``.

    Args:
        app: the application.
        scoring: answers.
        intake: reads bodies.
        settings: with the limits of a request.
    """
    most, per_batch, together = settings.max_candidates, settings.max_batch_requests, settings.max_batch_candidates

    @app.post(
        SCORE_PATH,
        response_model=ScoreResponse,
        responses=_RESPONSES,
        summary="Score the candidates of one request",
        openapi_extra=_READ,
    )
    async def score(request: Request) -> Response:
        """Raw values in, encoded by the definition that encoded the training data; probabilities out."""
        slot = _slot(request)
        scoring.models.scorer(slot)  # before a body is read that nobody can answer
        state = request.scope["state"]
        deadline = deadline_of(headers_of(request.scope).get(DEADLINE), state["arrived"])
        kind, body = await intake.take(request, TYPES)
        state["stages"].end("read")
        if kind == ARROW:
            (asked,) = await aside(len(body), arrow.parse, body, max_requests=1, max_candidates=most, most=most)
            if isinstance(asked, Refused):
                raise asked
        else:
            asked = await aside(len(body), parse_request, body, max_candidates=most)
        if asked.request_id is not None:
            state["request_id"] = asked.request_id
        state["candidates"] = len(asked.candidates)
        answer = await scoring.answer(
            asked,
            slot=slot,
            request_id=state["request_id"],
            deadline=deadline,
            stages=state["stages"],
            line=line_of(request.scope),
            size=len(body),
        )
        if _wants_arrow(request):
            reply = Response(arrow.reply([answer], [state["request_id"]]), media_type=ARROW)
        else:
            reply = Response(_encode(answer.content()), media_type=JSON)
        state["stages"].end("reply")
        return reply

    @app.post(
        BATCH_PATH,
        response_model=BatchResponse,
        responses=_RESPONSES,
        summary="Score many requests, each answered or refused on its own",
        openapi_extra=_READ,
    )
    async def score_batch(request: Request) -> Response:
        """Takes what many calls would, and shares forward passes among them. A rate counts every request."""
        slot = _slot(request)
        scoring.models.scorer(slot)
        state = request.scope["state"]
        deadline = deadline_of(headers_of(request.scope).get(DEADLINE), state["arrived"])
        kind, body = await intake.take(request, TYPES)
        state["stages"].end("read")
        parse = arrow.parse if kind == ARROW else parse_batch
        asked = await aside(len(body), parse, body, max_requests=per_batch, max_candidates=most, most=together)
        owe = request.scope["state"].get("owe")
        if owe is not None:
            owe(len(asked) - 1)
        state["candidates"] = sum(len(one.candidates) for one in asked if isinstance(one, Question))
        asked, ids = _named(asked, state["request_id"])
        answers = await scoring.answer_all(
            asked,
            slot=slot,
            request_ids=ids,
            deadline=deadline,
            stages=state["stages"],
            line=line_of(request.scope),
            size=len(body),
        )
        if _wants_arrow(request):
            reply = Response(arrow.reply(answers, ids), media_type=ARROW)
        else:
            replies = [_told(answer, one) for answer, one in zip(answers, ids, strict=True)]
            reply = Response(_encode({"replies": replies, "request_id": state["request_id"]}), media_type=JSON)
        state["stages"].end("reply")
        return reply


def _named(asked: Sequence[Question | Refused], request_id: str) -> tuple[list[Question | Refused], list[str]]:
    """Give each request of a batch an id that no other has; refuse one that takes another's.

    Example:
        >>> mine, same, none = (Question([{}], request_id=one) for one in ("a", "a", None))
        >>> asked, ids = _named([mine, same, none], "batch")
        >>> [type(one).__name__ for one in asked], ids
        (['Question', 'Refused', 'Question'], ['a', 'batch-1', 'batch-2'])
    """
    wanted = {one.request_id for one in asked if isinstance(one, Question)}
    found: list[Question | Refused] = []
    ids: dict[str, None] = {}
    for i, one in enumerate(asked):
        given = one.request_id if isinstance(one, Question) else None
        if given is not None and given in ids:
            one, given = Refused.of(422, ("request_id",), "another request of the batch has this id", "taken"), None
        if given is None:
            given = f"{request_id[-115:]}-{i}"
            given = uuid.uuid4().hex if given in wanted else given
        found.append(one)
        ids[given] = None
    return found, list(ids)


def _told(answer: Answer | Refused, request_id: str) -> dict[str, Any]:
    """Return one reply of a batch as JSON shows it."""
    if isinstance(answer, Answer):
        return {"status": 200, **answer.content()}
    problems = Problems(detail=answer.problems, request_id=request_id)
    return {"status": answer.status, **problems.model_dump()}


def _wants_arrow(request: Request) -> bool:
    return ARROW.encode() in headers_of(request.scope).get(b"accept", b"")


def _slot(request: Request) -> str | None:
    """Return the slot that the query asks for."""
    return request.query_params.get("model") if request.scope["query_string"] else None
