"""Routes of events and experiments."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal, TypeVar

from fastapi import FastAPI, Query, Request, Response
from fastapi.responses import JSONResponse
from pydantic import (
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    WithJsonSchema,
    model_validator,
)

from ctr_models.errors import ConfigError, nearest
from pipelines.experiments.experiment import Experiment
from serving.analysis import Interval, Results
from serving.database import EVENTS, Row, Unavailable
from serving.events import NotStored
from serving.experiments import Conflict, Pause
from serving.guardrails import PausedArms
from serving.router import unit_text
from serving.schemas import REQUEST_ID, SHOWN, Problem, Problems, Refused, read_object, valid
from serving.traffic import Traffic, not_stored

Read = Callable[[Request], Awaitable[bytes]]
Took = Callable[[Sequence[Row]], None]
T = TypeVar("T")
PATH = "/v1/events"
MOST_EVENTS = 1000
"""Events of one call."""
FUTURE = timedelta(minutes=10)
"""How far a client's clock may be ahead."""
EARLIEST = datetime(2000, 1, 1, tzinfo=UTC)


def _text(value: Any) -> Any:
    """Return an id as exposures have it."""
    text = unit_text(value)
    if text is None:
        raise ValueError("expected a text without NUL, or a whole number")
    return text


Id = Annotated[str, Field(pattern=f"^{REQUEST_ID}$")]
Key = Annotated[
    str,
    Field(max_length=256),
    BeforeValidator(_text),
    WithJsonSchema({"anyOf": [{"type": "string", "minLength": 1, "maxLength": 256}, {"type": "integer"}]}),
]


class Event(BaseModel):
    """What came of a candidate that was shown.

    It names its exposure by ``request_id`` and ``candidate``, or ``item``; or, for what comes later and elsewhere,
    the last one of ``unit`` and ``item``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    event_id: Id = Field(description="Of the sender's making; the same id is stored once.")
    type: Literal["click", "conversion", "skip"]
    time: AwareDatetime | None = Field(None, description="When it happened; the time of arrival without it.")
    request_id: Id | None = Field(None, description="Of the scored request.")
    candidate: int | None = Field(None, strict=True, ge=0, lt=100_000, description="Its place in that request.")
    unit: Key | None = Field(None, description="The user, as the features name him.")
    item: Key | None = Field(None, description="The item, as the features name it.")
    value: float | None = Field(None, strict=True, allow_inf_nan=False, description="For example of a purchase.")

    @model_validator(mode="after")
    def _finds_its_exposure(self) -> Event:
        by_request = self.request_id is not None and (self.candidate is not None or self.item is not None)
        if not by_request and (self.unit is None or self.item is None):
            raise ValueError("an event needs request_id and candidate (or item), or unit and item")
        if self.time is not None and not EARLIEST <= self.time <= datetime.now(UTC) + FUTURE:
            raise ValueError("time must lie after 1999 and not in the future")
        return self

    def row(self) -> Row:
        """Return the row that is stored."""
        now = time.time_ns() // 1000
        happened = now if self.time is None else round((self.time - _EPOCH) / timedelta(microseconds=1))
        return EVENTS, {**self.model_dump(exclude={"time"}), "time": happened, "received": now}


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Events(BaseModel):
    """A batch."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    events: Annotated[list[dict[str, Any]], FailFast()] = Field(min_length=1, max_length=MOST_EVENTS)

    def each(self) -> list[Event]:
        """Return the events.

        Raises:
            Refused: 422 with the path of each field that is wrong.
        """
        found: list[Event] = []
        problems: list[Problem] = []
        for i, one in enumerate(self.events):
            try:
                found.append(valid(Event, one))
            except Refused as error:
                problems += [p.model_copy(update={"loc": ["events", i, *p.loc]}) for p in error.problems]
                if len(problems) >= SHOWN:
                    break
        if problems:
            raise Refused(422, problems[:SHOWN])
        return found


class Why(BaseModel):
    """Why an arm is paused or resumed."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    reason: str = Field(min_length=1, max_length=500, pattern=r"^[^\x00]*$", description="For people.")


class ArmState(BaseModel):
    """Whether an arm is paused, and why."""

    experiment: str
    arm: str
    paused: bool
    reason: str


class Accepted(BaseModel):
    """The events are on disk."""

    accepted: int
    request_id: str


def add_routes(app: FastAPI, traffic: Traffic, read: Read, took: Took = lambda _: None) -> None:
    """Add ``/v1/events`` and ``/v1/experiments``.

    Args:
        app: the application.
        traffic: event store and experiments.
        read: gives a request's body, or refuses it.
        took: called with events that were acknowledged.
    """
    refusals: dict[int | str, dict[str, Any]] = {
        413: {"model": Problems, "description": "The body is too large"},
        422: {"model": Problems, "description": "The request is malformed; `loc` is the path of the field"},
        503: {"model": Problems, "description": "The database can't be reached; nothing was stored"},
    }
    unknown: dict[int | str, dict[str, Any]] = {
        404: {"model": Problems, "description": "No such experiment, or arm"},
        503: refusals[503],
    }
    for collector in (PausedArms(traffic.experiments), traffic.kept):
        app.state.metrics.registry.register(collector)
    event = Event.model_json_schema(ref_template="#/components/schemas/{model}")
    batch = {
        "type": "object",
        "properties": {"events": {"type": "array", "items": event, "minItems": 1, "maxItems": MOST_EVENTS}},
        "required": ["events"],
        "additionalProperties": False,
    }

    @app.post(
        PATH,
        response_model=Accepted,
        responses=refusals,
        summary="Take clicks, conversions and skips: one, or a batch",
        openapi_extra=_body({"oneOf": [event, batch]}),
    )
    async def take_events(request: Request) -> Response:
        """Answers once the events are on disk. An event that is sent again is stored once."""
        tree = read_object(await read(request), finite=True)
        events = valid(Events, tree).each() if "events" in tree else [valid(Event, tree)]
        rows = [one.row() for one in events]
        try:
            await traffic.store.record(rows)
        except NotStored as error:
            raise not_stored(error) from None
        took(rows)
        return JSONResponse({"accepted": len(events), "request_id": request.state.request_id})

    @app.post(
        "/v1/experiments",
        status_code=201,
        responses={**refusals, 409: {"model": Problems, "description": "It can't stand beside the others"}},
        summary="Store an experiment, or a new version of one",
        openapi_extra=_body({"type": "object"}),
    )
    async def put_experiment(request: Request) -> Any:
        """The body is what an experiment's YAML file says, as JSON. Arms name slots of the server."""
        try:
            experiment = Experiment.from_tree(read_object(await read(request), finite=True))
            for arm in experiment.arms:
                if arm.bundle is not None and traffic.slot_of(arm) is None:
                    raise ConfigError(
                        f"no slot serves {arm.bundle!r} with these gates",
                        where=f"arm {arm.name!r}",
                        remedy="serve it first, by sluice serve --model slot=model",
                    )
            version = await asyncio.to_thread(traffic.experiments.put, experiment)
        except ConfigError as error:
            raise Refused.of(422, ("body",), str(error), "value_error") from None
        except Conflict as error:
            raise Refused.of(409, ("body",), str(error), "conflict") from None
        except Unavailable as error:
            raise _away(error) from None
        return {"name": experiment.name, "version": version, "request_id": request.state.request_id}

    @app.get("/v1/experiments", responses={503: refusals[503]}, summary="The experiments, and their states")
    async def list_experiments() -> Any:
        await _refresh(traffic)
        return {"experiments": traffic.experiments.list()}

    @app.get(
        "/v1/experiments/{name}",
        responses=unknown,
        summary="One experiment",
    )
    async def get_experiment(name: str) -> Any:
        await _refresh(traffic)
        for one in traffic.experiments.list():
            if one["experiment"]["name"] == name:
                return JSONResponse(one)
        known = [one["experiment"]["name"] for one in traffic.experiments.list()]
        raise Refused.of(404, ("path", "name"), f"no such experiment; {nearest(name, known)}", "unknown")

    @app.get(
        "/v1/experiments/{name}/results",
        response_model=Results,
        responses=unknown,
        summary="What an experiment's arms showed in its present stage, and the differences",
    )
    async def get_results(
        name: str,
        interval: Annotated[
            Interval, Query(description="fixed is for one look, at a moment set beforehand.")
        ] = "sequential",
        at: Annotated[AwareDatetime | None, Query(description="As it stood then. Now without it.")] = None,
    ) -> Any:
        """Sequential intervals hold however often one looks. `problems` says what makes the figures doubtful."""
        await _refresh(traffic)
        return await _told(traffic.results.get(name, interval=interval, at=at))

    def change(verb: str, summary: str, act: Callable[[str, str, str], Pause]) -> None:
        @app.post(
            f"/v1/experiments/{{name}}/arms/{{arm}}/{verb}",
            response_model=ArmState,
            responses={**unknown, 413: refusals[413], 422: refusals[422]},
            summary=summary,
            operation_id=f"{verb}_arm",
            openapi_extra=_body(Why.model_json_schema()),
        )
        async def set_arm(request: Request, name: str, arm: str) -> Any:
            """Every server follows within some seconds."""
            why = valid(Why, read_object(await read(request), finite=True))
            done = await _told(asyncio.to_thread(act, name, arm, why.reason))
            return {"experiment": name, "arm": arm, "paused": done.paused, "reason": done.reason}

    change("pause", "Let the control serve an arm's units", traffic.experiments.pause)
    change("resume", "Let an arm serve its units again; results begin anew", traffic.experiments.resume)


async def _told(work: Awaitable[T]) -> T:
    try:
        return await work
    except ConfigError as error:
        raise Refused.of(404, ("path",), str(error), "unknown") from None
    except Unavailable as error:
        raise _away(error) from None


async def _refresh(traffic: Traffic) -> None:
    try:
        await asyncio.to_thread(traffic.experiments.refresh)
    except Unavailable as error:
        raise _away(error) from None


def _away(error: Unavailable) -> Refused:
    return Refused.of(
        503, (), f"the database can't be reached: {error}", "database_away", headers={"Retry-After": "1"}
    )


def _body(schema: dict[str, Any]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
