"""Requests and replies as Arrow IPC streams: the fields of their JSON, as columns, a row a request.

A stream is a schema and one record batch. Of a request the columns are::

    user        struct of columns           may be left out
    context     struct of columns           may be left out
    candidates  list of structs of columns
    request_id  utf8                        may be left out, or null
    model       utf8                        may be left out, or null

Columns hold booleans, integers, floats (32 or 64 bits), UTF-8 texts, or lists of these. What lets a small body
stand for a large one is refused before anything is made of it: compressed buffers, dictionaries, views, and buffers
that share bytes. All offsets and texts are validated before a value is read.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.features.candidate_columns import CandidateColumns
from serving.schemas import REQUEST_ID, Path, Question, Refused, too_many
from serving.scoring import Answer

MOST_COLUMNS = 1000
"""Of a user, a context or the candidates."""
MOST_VALUES = 2_000_000
"""Elements of all lists of a column together; a JSON body of the usual limit holds no more."""
SCALARS = frozenset({
    pa.null(), pa.bool_(), pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32(),
    pa.uint64(), pa.float32(), pa.float64(), pa.string(), pa.large_string(),
})  # fmt: skip
_TEXTS = (pa.string(), pa.large_string())
_RECORDS = ("user", "context")

_BY_NAME = pa.map_(pa.string(), pa.string())
_MODEL = pa.struct({"name": pa.string(), "version": pa.int64(), "hash": pa.string(), "gates": _BY_NAME})
_MISSING = pa.struct({"user": pa.bool_(), "items": pa.list_(pa.string())})
_FEATURES = pa.struct({"available": pa.bool_(), "version": pa.string(), "missing": _MISSING})
_PROBLEM = pa.struct({"loc": pa.list_(pa.string()), "msg": pa.string(), "type": pa.string()})
REPLY = pa.schema({
    "status": pa.int32(), "request_id": pa.string(), "scores": pa.list_(pa.float32()),
    "positions": pa.list_(pa.int64()), "experiments": _BY_NAME, "model": _MODEL,
    "features": _FEATURES, "detail": pa.list_(_PROBLEM),
})  # fmt: skip
"""Of a reply, a row a request. What its JSON would not have is null; ``status`` and ``detail`` tell of refusals."""


def parse(body: bytes, *, max_requests: int, max_candidates: int, most: int) -> list[Question | Refused]:
    """Read requests.

    Args:
        body: an IPC stream.
        max_requests: rows allowed.
        max_candidates: allowed in each.
        most: candidates allowed in all together.

    Returns:
        what each row asks, or what is wrong with it.

    Raises:
        Refused: 422, the stream as a whole is none that can be read.

    Example:
        >>> rows = pa.RecordBatch.from_pylist([{"user": {"id": 7}, "candidates": [{"ad": "a"}, {"ad": "b"}]}])
        >>> (asked,) = parse(stream(rows), max_requests=1, max_candidates=9, most=9)
        >>> asked.user, asked.candidates.columns
        ({'id': 7}, {'ad': ['a', 'b']})
    """
    try:
        batch = _read(body)
        if not len(batch):
            raise ValueError("no rows; a row is a request")
        if len(batch) > max_requests:
            raise too_many("requests", len(batch), max_requests)
        return _questions(batch, max_candidates, most)
    except (pa.ArrowException, OSError, ValueError, OverflowError, struct.error, MemoryError) as error:
        message = " ".join(str(error).split())[:200]
        raise Refused.of(422, ("body",), f"not a valid Arrow stream: {message}", "arrow_invalid") from None


def reply(answers: Sequence[Answer | Refused], request_ids: Sequence[str]) -> bytes:
    """Write replies as a stream of :data:`REPLY`.

    Args:
        answers: one a request.
        request_ids: likewise.
    """
    found = [one if isinstance(one, Answer) else None for one in answers]
    sizes = [0 if one is None else len(one.scores) for one in found]
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
    absent = pa.array([one is None for one in found])
    scores = np.concatenate([np.empty(0, np.float32), *(one.scores for one in found if one is not None)])
    told = {
        "status": [200 if isinstance(one, Answer) else one.status for one in answers],
        "request_id": list(request_ids),
        "positions": [one and one.said.get("positions") for one in found],
        "experiments": [one and _pairs(one.said.get("experiments")) for one in found],
        "model": [one and one.model.model_dump() | {"gates": _pairs(one.model.gates)} for one in found],
        "features": [one and one.stored and _features(one.stored.model_dump()) for one in found],
        "detail": [None if isinstance(one, Answer) else [_problem(p) for p in one.problems] for one in answers],
    }
    columns = {name: pa.array(values, REPLY.field(name).type) for name, values in told.items()}
    columns["scores"] = pa.ListArray.from_arrays(offsets, scores.astype(np.float32), mask=absent)
    return stream(pa.RecordBatch.from_arrays([columns[name] for name in REPLY.names], schema=REPLY))


def stream(batch: pa.RecordBatch) -> bytes:
    """Return a record batch as an IPC stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def _pairs(mapping: dict[str, str] | None) -> list[tuple[str, str]] | None:
    return None if mapping is None else list(mapping.items())


def _features(stored: dict[str, Any]) -> dict[str, Any]:
    missing = stored["missing"]
    return stored | {"missing": missing | {"items": [str(item) for item in missing["items"]]}}


def _problem(problem: Any) -> dict[str, Any]:
    return {"loc": [str(part) for part in problem.loc], "msg": problem.msg, "type": problem.type}


def _read(body: bytes) -> pa.RecordBatch:
    """Return the one record batch of a stream, validated; nothing in it is larger than the body."""
    reader = pa.ipc.MessageReader.open_stream(pa.py_buffer(body))
    messages: list[Any] = []
    while len(messages) < 3:
        try:
            messages.append(reader.read_next_message())
        except (StopIteration, EOFError):
            break
    if [message.type for message in messages] != ["schema", "record batch"]:
        raise ValueError("expected a schema, then one record batch without dictionaries")
    schema = pa.ipc.read_schema(messages[0])
    _check_schema(schema)
    if _compressed(bytes(messages[1].metadata)):
        raise ValueError("compressed buffers are not taken")
    batch = pa.ipc.read_record_batch(messages[1], schema)
    buffers = [buffer for column in batch.columns for buffer in column.buffers() if buffer is not None]
    if sum(buffer.size for buffer in buffers) > len(body):
        raise ValueError("buffers share bytes")
    if any(buffer.address % 8 for buffer in buffers if buffer.size):
        raise ValueError("buffers are not aligned to 8 bytes")
    batch.validate(full=True)
    return batch


def _check_schema(schema: pa.Schema) -> None:
    """Refuse a schema with names or types that a request does not have."""
    if "candidates" not in schema.names:
        raise Refused.of(422, ("candidates",), "required field is missing", "missing")
    if len(set(schema.names)) < len(schema.names):
        raise ValueError("two columns have one name")
    for field in schema:
        kind = field.type
        if field.name in _RECORDS and (pa.types.is_struct(kind) or pa.types.is_null(kind)):
            _check_columns(kind, field.name)
        elif field.name == "candidates" and _is_list(kind) and pa.types.is_struct(kind.value_type):
            _check_columns(kind.value_type, field.name)
        elif field.name in ("request_id", "model"):
            if kind not in (*_TEXTS, pa.null()):
                raise _wrong((field.name,), kind, "text")
        elif field.name in (*_RECORDS, "candidates"):
            raise _wrong((field.name,), kind, "a struct" if field.name in _RECORDS else "a list of structs")
        else:
            raise Refused.of(422, (field.name[:100],), "no such field", "extra_forbidden")


def _check_columns(record: pa.DataType, where: str) -> None:
    if record.num_fields > MOST_COLUMNS:
        raise ValueError(f"{record.num_fields:,} columns in {where}, at most {MOST_COLUMNS:,} are taken")
    fields = [record.field(i) for i in range(record.num_fields)]
    if len({field.name for field in fields}) < len(fields):
        raise ValueError(f"two columns of {where} have one name")
    for field in fields:
        kind = field.type.value_type if _is_list(field.type) else field.type
        if kind not in SCALARS:
            raise _wrong((where, field.name[:100]), field.type, "booleans, numbers, texts or lists of these")


def _wrong(path: Path, kind: pa.DataType, wanted: str) -> Refused:
    return Refused.of(422, path, f"expected {wanted}, got {str(kind)[:100]}; cast it", "arrow_type")


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def _compressed(metadata: bytes) -> bool:
    """Say whether the FlatBuffer of a record batch's message names a compression, without decoding anything."""

    def place(table: int, slot: int) -> int | None:
        (back,) = struct.unpack_from("<i", metadata, table)
        (size,) = struct.unpack_from("<H", metadata, table - back)
        at = 4 + 2 * slot
        (offset,) = struct.unpack_from("<H", metadata, table - back + at) if at < size else (0,)
        return table + offset if offset else None

    (root,) = struct.unpack_from("<I", metadata, 0)
    header = place(root, 2)
    if header is None:
        raise ValueError("a message without a header")
    (record,) = struct.unpack_from("<I", metadata, header)
    return place(header + record, 3) is not None


def _questions(batch: pa.RecordBatch, max_candidates: int, most: int) -> list[Question | Refused]:
    rows = len(batch)
    columns = dict(zip(batch.schema.names, batch.columns, strict=True))
    candidates = columns["candidates"]
    offsets = candidates.offsets.to_numpy().astype(np.int64)
    counts, absent = np.diff(offsets), candidates.is_null().to_numpy(zero_copy_only=False)
    first, last = int(offsets[0]), int(offsets[-1])
    if last - first > most:
        raise too_many("candidates", last - first, most)
    records = candidates.values.slice(first, last - first)
    if records.null_count:
        raise Refused.of(422, ("candidates",), "expected structs, got null", "dict_type")
    values = _columns(records, "candidates")
    user, context = (_rows(columns.get(name), name, rows) for name in _RECORDS)
    ids, models = (columns[n].to_pylist() if n in columns else [None] * rows for n in ("request_id", "model"))
    found: list[Question | Refused] = []
    for i in range(rows):
        begin, count = int(offsets[i]) - first, int(counts[i])
        if absent[i]:
            found.append(Refused.of(422, ("candidates",), "required field is missing", "missing"))
        elif not count:
            found.append(Refused.of(422, ("candidates",), "no candidates; at least one is needed", "too_short"))
        elif count > max_candidates:
            found.append(too_many("candidates", count, max_candidates))
        elif ids[i] is not None and not re.fullmatch(REQUEST_ID, str(ids[i])):
            message = "1 to 128 visible ASCII characters are allowed"
            found.append(Refused.of(422, ("request_id",), message, "string_pattern_mismatch"))
        else:
            own = {name: column[begin : begin + count] for name, column in values.items()}
            question = Question(CandidateColumns(count, own), user[i], context[i], ids[i], models[i])  # type: ignore[arg-type]
            found.append(question)
    return found


def _rows(records: pa.StructArray | None, where: str, rows: int) -> list[dict[str, Any]]:
    """Return a struct column as a dictionary a request."""
    if records is None or pa.types.is_null(records.type):
        return [{}] * rows
    columns = _columns(records, where)
    if not columns:
        return [{}] * rows
    given = records.is_valid().to_pylist()
    rowwise = zip(*columns.values(), strict=True)
    return [dict(zip(columns, row, strict=True)) if ok else {} for ok, row in zip(given, rowwise, strict=True)]


def _columns(records: pa.StructArray, where: str) -> dict[str, list[Any]]:
    """Return the columns of a struct column as values of Python."""
    found = {}
    for field in records.type:
        column = records.field(field.name)
        values = column
        if _is_list(field.type):
            values = column.flatten()
            if len(values) > MOST_VALUES or (len(values) and pa.types.is_null(values.type)):
                raise ValueError(f"too many values in a list of {where}.{field.name[:100]}")
        if pa.types.is_floating(values.type) and np.isinf(values.drop_null().to_numpy()).any():
            message = "Infinity is no value; leave the column out, or give null, when it is missing"
            raise Refused.of(422, (where, field.name[:100]), message, "finite_number")
        found[field.name] = column.to_pylist()
    return found
