"""The Open Inference Protocol, version 2, which KServe's and Triton's clients speak: tensors in, scores out.

An input is a column of the request, by name, of shape [N]; a column of several values, such as a behaviour history,
has shape [N, L], filled up at the end with "" or NaN, which count as missing. Rows are flat: a user's columns are
repeated in each. Tensors may be JSON, or binary behind the JSON, each one told by ``binary_data_size``.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
import struct
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from types import NoneType
from typing import Any

import numpy as np
import polars as pl
from fastapi import FastAPI, Request, Response

from ctr_models.errors import SluiceError, nearest
from pipelines.features.candidate_columns import CandidateColumns
from pipelines.features.spec import FeatureSpec
from serving.aside import aside
from serving.deadline import DEADLINE, PARAMETER, PASSED, deadline_of
from serving.limits import headers_of
from serving.line import line_of
from serving.schemas import REQUEST_ID, ModelCard, Question, Refused, read_object
from serving.scorer import Scorer
from serving.scoring import Scoring

HEADER = "inference-header-content-length"
OUTPUT = "score"
NUMBERS: dict[str, str] = {
    "BOOL": "?", "INT8": "<i1", "INT16": "<i2", "INT32": "<i4", "INT64": "<i8", "UINT8": "<u1", "UINT16": "<u2",
    "UINT32": "<u4", "UINT64": "<u8", "FP16": "<f2", "FP32": "<f4", "FP64": "<f8",
}  # fmt: skip
"""Data types of fixed size and how numpy reads them; the one other is BYTES."""
LONGEST = 1000
"""Characters of a message: what a request brings is repeated in it."""
PART = 32_768
"""Values that become an array at once."""
_MODELS = {"/v2/models/{name}": "", "/v2/models/{name}/versions/{version}": " of a version"}
INFER_PATHS = tuple(f"{path}/infer" for path in _MODELS)
_EXTENSIONS = ["binary_tensor_data"]
_PLAIN: dict[str, set[type]] = {"BYTES": {str, NoneType}, "BOOL": {bool}}
"""Types of what stands in JSON for data that is no number; whole numbers and truth know no missing value."""


@dataclass(frozen=True)
class Inference:
    """What a request asks for.

    Args:
        frame: its raw rows.
        id: comes back in the answer.
        binary: whether the scores are wanted in binary.
    """

    frame: pl.DataFrame
    id: str | None
    binary: bool


def decode(body: bytes, header: str | None, columns: Mapping[str, bool], *, max_rows: int) -> Inference:
    """Read a request.

    Args:
        body: JSON, and after it binary tensors, if any.
        header: value of the header that says how long the JSON is; None: all of it is.
        columns: those of the model, and whether each has several values a row.
        max_rows: most rows allowed.

    Raises:
        Refused: 400, naming the input that is wrong; 422, the JSON is none.

    Example:
        >>> body = b'{"inputs": [{"name": "price", "shape": [2], "datatype": "FP64", "data": [1.5, 2]}]}'
        >>> decode(body, None, {"price": False}, max_rows=9).frame["price"].to_list()
        [1.5, 2.0]
    """
    tree, tail = _split(body, header)
    inputs = tree.get("inputs")
    if not isinstance(inputs, list) or not inputs or not all(isinstance(one, dict) for one in inputs):
        raise _broken("inputs must be a list of tensors, at least one")
    found: dict[str, pl.Series] = {}
    for one in inputs:
        name = one.get("name")
        if not isinstance(name, str) or name not in columns:
            raise _broken(f"no input {name!r}; {nearest(str(name), columns)}")
        if name in found:
            raise _broken(f"input {name!r} is given twice")
        flat, shape, tail = _tensor(name, one, tail, many=columns[name], max_rows=max_rows)
        found[name] = _series(name, flat, shape)
    if tail:
        raise _broken(f"{len(tail)} bytes are left over behind the last binary tensor")
    sizes = {name: len(series) for name, series in found.items()}
    if len(set(sizes.values())) > 1:
        raise _broken(f"inputs differ in their number of rows: {sizes}")
    given = tree.get("id")
    if given is not None and not isinstance(given, str):
        raise _broken("id must be text")
    return Inference(pl.DataFrame(found), given, _wants_binary(tree))


def encode(
    scores: np.ndarray, *, name: str, version: str, id: str | None, binary: bool
) -> tuple[bytes, dict[str, str]]:
    """Return the body of an answer and its headers.

    Args:
        scores: (N,).
        name: of the model.
        version: of the model.
        id: of the request.
        binary: whether the scores follow the JSON in binary.

    Example:
        >>> body, _ = encode(np.array([0.5]), name="clicks", version="3", id=None, binary=False)
        >>> json.loads(body)["outputs"][0]["data"]
        [0.5]
    """
    output: dict[str, Any] = {"name": OUTPUT, "shape": [len(scores)], "datatype": "FP32"}
    raw = scores.astype("<f4").tobytes() if binary else b""
    output |= {"parameters": {"binary_data_size": len(raw)}} if binary else {"data": scores.tolist()}
    answer: dict[str, Any] = {"model_name": name, "model_version": version, "outputs": [output]}
    if id is not None:
        answer["id"] = id
    text = json.dumps(answer, separators=(",", ":")).encode()
    if not binary:
        return text, {"content-type": "application/json"}
    return text + raw, {"content-type": "application/octet-stream", HEADER: str(len(text))}


def one_user(frame: pl.DataFrame, spec: FeatureSpec) -> Question | None:
    """Return rows as the request of one user; None if they are of several.

    Columns of the user and of the situation that are the same in every row are taken as such.

    Example:
        >>> spec = FeatureSpec.model_validate({"label": "click", "user": "who", "columns": [
        ...     {"name": "city", "kind": "categorical", "role": "user"}, {"name": "ad", "kind": "categorical"}]})
        >>> asked = one_user(pl.DataFrame({"who": [7, 7], "city": ["Graz", "Graz"], "ad": [1, 2]}), spec)
        >>> asked.user, list(asked.candidates)
        ({'who': 7, 'city': 'Graz'}, [{'ad': 1}, {'ad': 2}])
        >>> one_user(pl.DataFrame({"who": [7, 8]}), spec) is None
        True
    """
    if spec.user in frame.columns and frame[spec.user].n_unique() > 1:
        return None
    roles = {(c.name if c.from_log else c.column): c.role for c in spec.direct}
    roles |= {} if spec.user is None else {spec.user: "user"}
    parts: dict[str, dict[str, Any]] = {"user": {}, "context": {}, "item": {}}
    for name, values in frame.to_dict(as_series=False).items():
        role = roles.get(name, "item")
        same = role != "item" and values.count(values[0]) == len(values)
        parts[role if same else "item"][name] = values[0] if same else values
    candidates = CandidateColumns(len(frame), parts["item"])
    return Question(candidates, parts["user"], parts["context"])  # type: ignore[arg-type]


def metadata(name: str, scorer: Scorer) -> dict[str, Any]:
    """Describe a model's tensors, by the types of its golden rows."""
    inputs = [
        {"name": column, "datatype": _datatype(dtype), "shape": [-1, -1] if dtype == pl.List else [-1]}
        for column, dtype in scorer.inputs.items()
    ]
    return {
        "name": name,
        "versions": [_version(scorer.card)],
        "platform": "sluice",
        "inputs": inputs,
        "outputs": [{"name": OUTPUT, "datatype": "FP32", "shape": [-1]}],
    }


def add_routes(
    app: FastAPI,
    scoring: Scoring,
    read: Callable[[Request], Awaitable[bytes]],
    *,
    max_rows: int,
) -> None:
    """Add the protocol's routes. A model is named by its slot.

    Args:
        app: the application.
        scoring: answers.
        read: returns the body of a request within the limits.
        max_rows: most rows a request may ask for.
    """
    models = scoring.models
    route = partial(app.api_route, tags=["Open Inference Protocol"], response_class=Response)
    refused: dict[int | str, dict[str, Any]] = {
        400: {"description": "The request breaks the protocol or does not fit the model"}
    }
    unknown: dict[int | str, dict[str, Any]] = {404: {"description": "No such model"}}

    def found(name: str, version: str | None) -> Scorer:
        scorer = models.slots[name].scorer if name in models.slots else None
        if scorer is None or version not in (None, _version(scorer.card)):
            raise _unknown(name, version)
        return scorer

    @route("/v2/health/live", methods=["GET"], summary="The process is alive")
    async def live() -> Response:
        return _told({"live": True})

    @route(
        "/v2/health/ready",
        methods=["GET"],
        summary="Every slot has a verified model",
        responses={503: {"description": "Not yet"}},
    )
    async def ready() -> Response:
        return _told({"ready": models.ready}, 200 if models.ready else 503)

    @route("/v2", methods=["GET"], summary="The server and the extensions that it speaks")
    async def server() -> Response:
        return _told({"name": "sluice", "version": app.version, "extensions": _EXTENSIONS})

    async def model_ready(name: str, version: str | None = None) -> Response:
        found(name, version)
        return _told({"name": name, "ready": True})

    async def model(name: str, version: str | None = None) -> Response:
        return _told(metadata(name, found(name, version)))

    def understood(body: bytes, header: str | None, scorer: Scorer) -> tuple[Inference, Question | None]:
        spec = scorer.bundle.state.spec
        columns = {name: False for name in (spec.user, spec.item) if name is not None}
        columns |= {column: dtype == pl.List for column, dtype in scorer.inputs.items()}
        asked = decode(body, header, columns, max_rows=max_rows)
        return asked, one_user(asked.frame, spec)

    async def infer(request: Request, name: str, version: str | None = None) -> Response:
        found(name, version)  # before a body is read that nobody can answer
        try:
            deadline = deadline_of(headers_of(request.scope).get(DEADLINE), request.state.arrived)
            body = await read(request)
            scorer = found(name, version)
            asked, question = await aside(len(body), understood, body, request.headers.get(HEADER), scorer)
            request.state.candidates = len(asked.frame)
            if asked.id is not None and re.fullmatch(REQUEST_ID, asked.id):
                request.state.request_id = asked.id
            line, request_id = line_of(request.scope), request.state.request_id
            if question is None:
                encoded = await asyncio.to_thread(scorer.encode_frame, asked.frame)
                scores = await scoring.score(name, scorer, encoded, deadline, line=line)
            else:
                answer = await scoring.answer(
                    question,
                    slot=name,
                    request_id=request_id,
                    deadline=deadline,
                    scorer=scorer,
                    line=line,
                    size=len(body),
                )
                scores = answer.scores
        except SluiceError as error:
            raise _broken(str(error)) from None
        except Refused as error:
            if error.status != 422:
                raise
            where = ".".join(map(str, error.problems[0].loc))
            raise _broken(f"{where}: {error}") from None
        told, headers = encode(scores, name=name, version=_version(scorer.card), id=asked.id, binary=asked.binary)
        return Response(told, headers=headers)

    for path, place in _MODELS.items():
        route(path, methods=["GET"], summary=f"The tensors of a model{place}", responses=unknown)(model)
        route(f"{path}/ready", methods=["GET"], summary=f"A model{place} answers", responses=unknown)(model_ready)
        route(
            f"{path}/infer",
            methods=["POST"],
            summary=f"Score rows with a model{place}",
            responses={
                **refused,
                **unknown,
                413: {"description": "The body is too large"},
                503: {"description": "The server is at its capacity"},
                504: {"description": PASSED},
            },
            openapi_extra={"parameters": [PARAMETER]},
        )(infer)


def _version(card: ModelCard) -> str:
    return card.hash[:12] if card.version is None else str(card.version)


def _told(content: Mapping[str, Any], status: int = 200) -> Response:
    return Response(json.dumps(content), status_code=status, media_type="application/json")


def _unknown(name: str, version: str | None) -> Refused:
    of = f" of version {version!r}" if version else ""
    return Refused.of(404, ("path",), f"no model {name!r}{of}", "unknown_model")


def _broken(message: str) -> Refused:
    """Return the refusal of a request that breaks the protocol or does not fit the model."""
    return Refused.of(400, ("body",), message if len(message) <= LONGEST else message[:LONGEST] + "...", "protocol")


def _split(body: bytes, header: str | None) -> tuple[dict[str, Any], memoryview]:
    size = len(body)
    if header is not None:
        if not header.isascii() or not header.isdigit() or len(header) > 18 or int(header) > len(body):
            raise _broken(f"{HEADER} is {header[:40]!r}, the body has {len(body)} bytes")
        size = int(header)
    return read_object(body[:size]), memoryview(body)[size:]


def _tensor(
    name: str, one: Mapping[str, Any], tail: memoryview, *, many: bool, max_rows: int
) -> tuple[np.ndarray | list[str | None], tuple[int, ...], memoryview]:
    """Return the values of a tensor, flat, its shape, and what is left of the binary data."""
    kind, shape = one.get("datatype"), one.get("shape")
    if kind != "BYTES" and kind not in NUMBERS:
        raise _broken(f"input {name!r}: no datatype {kind!r}; {nearest(str(kind), ['BYTES', *NUMBERS])}")
    if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 2**31 for n in shape):
        raise _broken(f"input {name!r}: shape must be a list of sizes, got {shape!r}")
    if len(shape) == 2 and shape[1] == 1 and not many:
        shape = shape[:1]
    if len(shape) != 1 + many:
        wanted = "[rows, values]" if many else "[rows]"
        raise _broken(f"input {name!r}: shape must be {wanted}, got {shape}")
    if not 1 <= shape[0] <= max_rows:
        raise _broken(f"input {name!r}: {shape[0]:,} rows, 1 to {max_rows:,} are allowed")
    count = math.prod(shape)
    parameters = one.get("parameters")
    size = parameters.get("binary_data_size") if isinstance(parameters, dict) else None
    if size is not None:
        if type(size) is not int or not 0 <= size <= len(tail):
            raise _broken(f"input {name!r}: binary_data_size {size!r}, {len(tail)} bytes are there")
        return _from_binary(name, kind, tail[:size], count), tuple(shape), tail[size:]
    return _from_json(name, kind, one.get("data"), count), tuple(shape), tail


def _from_binary(name: str, kind: str, raw: memoryview, count: int) -> np.ndarray | list[str | None]:
    if kind != "BYTES":
        dtype = np.dtype(NUMBERS[kind])
        if len(raw) != count * dtype.itemsize:
            raise _broken(f"input {name!r}: {len(raw)} bytes, {count * dtype.itemsize} make up its shape")
        return np.frombuffer(raw, dtype)
    texts: list[str | None] = []
    at = 0
    while at + 4 <= len(raw) and len(texts) < count:
        (size,) = struct.unpack_from("<I", raw, at)
        at += 4
        if size > len(raw) - at:
            break
        texts.append(_text(name, bytes(raw[at : at + size])))
        at += size
    if len(texts) != count or at != len(raw):
        raise _broken(f"input {name!r}: its bytes do not hold {count} texts, each behind its length")
    return texts


def _from_json(name: str, kind: str, data: Any, count: int) -> np.ndarray | list[str | None]:
    if not isinstance(data, list):
        raise _broken(f"input {name!r}: data must be a list")
    flat = list(chain.from_iterable(data)) if data and set(map(type, data)) == {list} else data
    if len(flat) != count:
        raise _broken(f"input {name!r}: {len(flat)} values, its shape holds {count}")
    wanted = {int, float, NoneType} if kind.startswith("FP") else _PLAIN.get(kind, {int})
    wrong = set(map(type, flat)) - wanted
    if wrong:
        value = next(value for value in flat if type(value) in wrong)
        raise _broken(f"input {name!r}: {value!r} is no {kind}")
    if kind == "BYTES":
        return flat
    # In parts: each holds the interpreter for a moment only, so that the event loop gets its turns.
    parts = [flat[begin : begin + PART] for begin in range(0, count, PART)] or [flat]
    try:
        return np.concatenate([np.array(part, dtype=NUMBERS[kind]) for part in parts])  # null becomes NaN
    except (OverflowError, TypeError, ValueError) as error:
        raise _broken(f"input {name!r}: {error}") from None


def _text(name: str, raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise _broken(f"input {name!r}: a text is not UTF-8") from None


def _series(name: str, flat: np.ndarray | Sequence[str | None], shape: tuple[int, ...]) -> pl.Series:
    values = pl.Series(name, flat, dtype=None if isinstance(flat, np.ndarray) else pl.String)
    if len(shape) == 1:
        return values
    if not shape[1]:
        return pl.Series(name, [[]] * shape[0], dtype=pl.List(values.dtype))
    missing = values.is_nan() if values.dtype.is_float() else values == "" if values.dtype == pl.String else None
    if missing is not None:
        values = values.set(missing, None)
    # What fills up a row is no value of it.
    return values.reshape(shape).arr.to_list().list.drop_nulls()


def _wants_binary(tree: Mapping[str, Any]) -> bool:
    parameters = tree.get("parameters")
    wanted = bool(isinstance(parameters, dict) and parameters.get("binary_data_output"))
    outputs = tree.get("outputs")
    if outputs is None:
        return wanted
    if not isinstance(outputs, list):
        raise _broken("outputs must be a list")
    for one in outputs:
        name = one.get("name") if isinstance(one, dict) else one
        if name != OUTPUT:
            raise _broken(f"no output {name!r}; the one there is is {OUTPUT!r}")
        own = one.get("parameters")
        if isinstance(own, dict) and "binary_data" in own:
            wanted = bool(own["binary_data"])
    return wanted


def _datatype(dtype: pl.DataType) -> str:
    if isinstance(dtype, pl.List):
        return _datatype(dtype.inner)  # type: ignore[arg-type]
    if dtype.is_integer():
        return "INT64"
    return "FP64" if dtype.is_float() else "BOOL" if dtype == pl.Boolean else "BYTES"
