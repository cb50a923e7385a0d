"""What goes over the wire: the scoring request and its checks, the answer, the errors."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from functools import cached_property
from itertools import chain, islice
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError
from pydantic_core import ErrorDetails, from_json

from ctr_models.errors import RequestError, nearest

Path = tuple[str | int, ...]
REQUEST_ID = r"[\x21-\x7e]{1,128}"
"""What a request may be called."""
SHOWN = 10
"""Problems reported of one request."""
LONGEST_NAME = 100
"""Characters of an unknown name that are repeated in an answer."""
_WANTED = {"dict_type": "an object", "list_type": "a list", "string_type": "text"}


class ScoreRequest(BaseModel):
    """One user, one situation, many candidates, as raw values. A column that is left out, or null, is missing."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    user: dict[str, Any] = Field(default_factory=dict, description="Columns of the user, histories included.")
    context: dict[str, Any] = Field(default_factory=dict, description="Columns of the situation.")
    candidates: Annotated[list[dict[str, Any]], FailFast()] = Field(
        min_length=1, description="Columns of each candidate."
    )
    request_id: str | None = Field(None, pattern=f"^{REQUEST_ID}$", description="Comes back in the answer.")
    model: str | None = Field(None, description="The slot whose model shall answer; the server's first without it.")


class BatchRequest(BaseModel):
    """Many requests in one body. Each is answered, or refused, on its own."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    requests: list[ScoreRequest] = Field(min_length=1)


class ModelCard(BaseModel):
    """The model that answered."""

    model_config = ConfigDict(frozen=True)
    name: str
    version: int | None
    hash: str
    gates: dict[str, str]

    @cached_property
    def shown(self) -> msgspec.Raw:
        """It as answers show it, made once."""
        return msgspec.Raw(self.model_dump_json().encode())


class Missing(BaseModel):
    """Who was asked for and is not stored."""

    user: bool
    items: list[Any] = Field(description="Their ids, each once.")


class StoredFeatures(BaseModel):
    """What the online feature store gave. Who is missing was scored with what the request itself gives."""

    available: bool = Field(description="False: the store could not answer, and nothing of it was used.")
    version: str | None
    missing: Missing


class ScoreResponse(BaseModel):
    """A click probability for each candidate, in the order of the request."""

    scores: list[float]
    model: ModelCard
    request_id: str
    experiments: dict[str, str] | None = Field(None, description="The request's arm in each experiment it is in.")
    positions: list[int] | None = Field(
        None, description="Where to show each candidate, from 0; only where an experiment draws the order."
    )
    features: StoredFeatures | None = Field(None, description="Only of servers with an online feature store.")


class Problem(BaseModel):
    """One thing that is wrong with a request."""

    loc: list[str | int]
    msg: str
    type: str


class Problems(BaseModel):
    """Why a request was refused."""

    detail: list[Problem]
    request_id: str


class BatchReply(ScoreResponse):
    """The answer to one request of a batch, with its status 200."""

    status: Literal[200]


class BatchProblems(Problems):
    """Why one request of a batch was refused, with the status that it would have got alone."""

    status: int


class BatchResponse(BaseModel):
    """The replies, in the order of the requests."""

    replies: list[BatchReply | BatchProblems]
    request_id: str


class Refused(Exception):
    """A request that can't be answered, with the status and the problems to report."""

    def __init__(self, status: int, problems: list[Problem], *, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(problems[0].msg)
        self.status, self.problems, self.headers = status, problems, dict(headers or {})

    @classmethod
    def of(cls, status: int, path: Path, message: str, kind: str, **more: Any) -> Refused:
        """Make one of a single problem."""
        return cls(status, [Problem(loc=list(path), msg=message, type=kind)], **more)


def overloaded(seconds: float) -> Refused:
    """Return the refusal of a request for which there is no room; clients come back when there should be."""
    message = "the server is at its capacity; come back later"
    return Refused.of(503, (), message, "overloaded", headers={"Retry-After": str(max(1, math.ceil(seconds)))})


class Question(msgspec.Struct, forbid_unknown_fields=True):
    """A request as it is read; :class:`ScoreRequest` describes it."""

    candidates: list[dict[str, Any]]
    user: dict[str, Any] = {}
    context: dict[str, Any] = {}
    request_id: Annotated[str, msgspec.Meta(pattern=rf"^{REQUEST_ID}\Z")] | None = None
    model: str | None = None


class _Batch(msgspec.Struct, forbid_unknown_fields=True):
    requests: list[msgspec.Raw]


class _Requests(BaseModel):
    model_config = ConfigDict(extra="forbid")
    requests: list[Any] = Field(min_length=1)


_decode = msgspec.json.Decoder(Question).decode
_decode_batch = msgspec.json.Decoder(_Batch).decode
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
Model = TypeVar("Model", bound=BaseModel)


def parse_request(body: bytes, *, max_candidates: int) -> Question:
    """Read a request and check what can be told without knowing the features.

    Args:
        body: JSON.
        max_candidates: most candidates allowed.

    Raises:
        Refused: 422 with the path of each field that is wrong.
    """
    try:
        request = _decode(body)
    except _UNREADABLE:
        request = examine(read_object(body))
    return _within(request, max_candidates)


def parse_batch(body: bytes, *, max_requests: int, max_candidates: int, most: int) -> list[Question | Refused]:
    """Read many requests.

    Args:
        body: JSON, see :class:`BatchRequest`.
        max_requests: most of them.
        max_candidates: allowed in each.
        most: candidates allowed in all together.

    Returns:
        what each asks, or what is wrong with it.

    Raises:
        Refused: 422, the body as a whole is none that can be read.
    """
    requests: list[Any]
    try:
        requests = _decode_batch(body).requests
    except _UNREADABLE:  # it tells not of which request
        requests = valid(_Requests, read_object(body)).requests
    if not requests:
        valid(_Requests, {"requests": []})
    if len(requests) > max_requests:
        raise too_many("requests", len(requests), max_requests)
    found: list[Question | Refused] = []
    left = most
    for one in requests:
        try:
            if isinstance(one, msgspec.Raw):
                question = parse_request(bytes(one), max_candidates=max_candidates)
            else:
                question = _within(examine(one), max_candidates)
        except Refused as error:
            found.append(error)
            continue
        left -= len(question.candidates)
        if left < 0:
            raise too_many("candidates in all", most - left, most)
        found.append(question)
    return found


def too_many(what: str, count: int, limit: int) -> Refused:
    """Return the refusal of a request that holds more than it may."""
    name = what.split()[0]
    return Refused.of(422, (name,), f"{count:,} {what}, at most {limit:,} are allowed", f"too_many_{name}")


def examine(tree: Any) -> Question:
    """Check a request as :func:`parse_request` does, but slowly: able to say what is wrong, field by field.

    Args:
        tree: as JSON says it; NaN and Infinity may stand in it.

    Raises:
        Refused: 422 with the path of each field that is wrong.
    """
    request = valid(ScoreRequest, tree)
    extreme = chain(
        _not_finite(("user",), request.user),
        _not_finite(("context",), request.context),
        chain.from_iterable(_not_finite(("candidates", i), one) for i, one in enumerate(request.candidates)),
    )
    problems = list(islice(extreme, SHOWN))
    if problems:
        raise Refused(422, problems)
    return Question(**request.model_dump())


def read_object(body: bytes, *, finite: bool = False) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        body: the JSON.
        finite: refuse NaN and Infinity, which are no JSON, but which many parsers and writers let pass.

    Raises:
        Refused: 422, it is not readable, or no object.
    """
    try:
        tree = from_json(body, allow_inf_nan=not finite)
    except ValueError as error:
        raise Refused.of(422, ("body",), f"not valid JSON: {error}", "json_invalid") from None
    return _object(tree)


def valid(model: type[Model], tree: Any) -> Model:
    """Check an object against a model.

    Of unknown names only the first are looked at: each costs a thousand times what it cost to send.

    Raises:
        Refused: 422 with the first :data:`SHOWN` problems.
    """
    tree = _object(tree)
    unknown = islice((name for name in tree if name not in model.model_fields), SHOWN)
    names = chain((name for name in model.model_fields if name in tree), unknown)
    try:
        return model.model_validate({name: tree[name] for name in names})
    except ValidationError as error:
        raise Refused(422, [_problem(e, model) for e in error.errors()[:SHOWN]]) from None


def refused_value(error: RequestError, columns: Collection[str]) -> Refused:
    """Turn the encoder's complaint, whose place is dotted, into a problem with a path."""
    return Refused.of(422, _path(error.where, columns), _sentence(error.problem, error.remedy), "value_error")


def _within(request: Question, max_candidates: int) -> Question:
    if not request.candidates:
        raise Refused.of(422, ("candidates",), "no candidates; at least one is needed", "too_short")
    if len(request.candidates) > max_candidates:
        raise too_many("candidates", len(request.candidates), max_candidates)
    return request


def _object(tree: Any) -> dict[str, Any]:
    if not isinstance(tree, dict):
        raise Refused.of(422, ("body",), f"expected an object, got {_kind(tree)}", "object_type")
    return tree


def _not_finite(path: Path, values: Mapping[str, Any]) -> Iterator[Problem]:
    """NaN and Infinity are not JSON, but parsers let them in, and to the features NaN means missing."""
    for name, value in values.items():
        many = value if type(value) is list else (value,)
        for i, one in enumerate(many):
            if type(one) is float and not math.isfinite(one):
                place = [*path, name, i] if type(value) is list else [*path, name]
                message = "NaN and Infinity are no values; leave the column out, or give null, when it is missing"
                yield Problem(loc=place, msg=message, type="finite_number")


def _problem(error: ErrorDetails, model: type[BaseModel]) -> Problem:
    path = [one[:LONGEST_NAME] if isinstance(one, str) else one for one in error["loc"]]
    kind, message = error["type"], error["msg"].removeprefix("Value error, ")
    if kind == "extra_forbidden":
        message = _sentence("no such field", nearest(str(path[-1]), model.model_fields))
    elif kind == "missing":
        message = "required field is missing"
    elif kind == "too_short":
        message = f"no {path[-1]}; at least one is needed"
    elif kind in _WANTED:
        message = f"expected {_WANTED[kind]}, got {_kind(error['input'])}"
    elif kind == "string_pattern_mismatch" and REQUEST_ID in error["ctx"]["pattern"]:
        message = "1 to 128 visible ASCII characters are allowed"
    return Problem(loc=path, msg=message, type=kind)


def _path(where: str, columns: Collection[str]) -> Path:
    head, _, rest = where.partition(".")
    path: list[str | int] = [head]
    if head == "candidates":
        index, _, rest = rest.partition(".")
        path.append(int(index) if index.isdigit() else index)
    column, _, element = rest.rpartition(".")
    if rest not in columns and element.isdigit():  # a column's own name may hold dots
        path += [column, int(element)]
    elif rest:
        path.append(rest)
    return tuple(path)


def _sentence(problem: str, remedy: str) -> str:
    return f"{problem}; {remedy}" if remedy else problem


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")
