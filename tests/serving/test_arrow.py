"""Arrow says what JSON says, and no stream, however mangled, does more than be refused."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines.release.example import example_bundle, example_log
from serving.app import create_app
from serving.arrow import REPLY, parse, stream
from serving.limits import ARROW
from serving.schemas import Problem, Question, Refused
from serving.settings import Settings

LIMITS = {"max_requests": 4, "max_candidates": 50, "most": 100}
ASKED = {
    "user": {"user_id": 3, "clicked": ["item-1", "item-2"]},
    "context": {"hour": 9},
    "candidates": [{"item_id": "item-1", "price": 2.5, "tags": ["a"]}, {"item_id": "é", "price": None, "tags": []}],
    "request_id": "r-1",
}


def written(*requests: dict[str, Any], schema: pa.Schema | None = None, **options: Any) -> bytes:
    batch = pa.RecordBatch.from_pylist(list(requests), schema=schema)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def refused(body: bytes, **limits: int) -> Problem:
    with pytest.raises(Refused) as caught:
        parse(body, **{**LIMITS, **limits})
    assert caught.value.status == 422
    return caught.value.problems[0]


def test_a_row_is_a_request() -> None:
    one, two = parse(written(ASKED, {**ASKED, "user": None, "request_id": None}), **LIMITS)
    assert isinstance(one, Question)
    assert isinstance(two, Question)
    assert (one.user, one.context, one.request_id) == (ASKED["user"], ASKED["context"], "r-1")
    assert list(one.candidates) == ASKED["candidates"]
    assert (two.user, two.request_id) == ({}, None)
    only = parse(written({"candidates": [{}, {}]}), **LIMITS)[0]
    assert isinstance(only, Question)
    assert list(only.candidates) == [{}, {}]


def test_large_types_are_taken_too() -> None:
    record = pa.struct({"item_id": pa.large_string(), "tags": pa.large_list(pa.large_string()), "n": pa.uint8()})
    schema = pa.schema({"candidates": pa.large_list(record), "model": pa.large_string()})
    rows = [{"item_id": "a", "tags": ["x"], "n": 7}]
    (one,) = parse(written({"candidates": rows, "model": "m"}, schema=schema), **LIMITS)
    assert isinstance(one, Question)
    assert (list(one.candidates), one.model) == (rows, "m")


def typed(kind: pa.DataType, value: Any) -> bytes:
    """A request whose one candidate has one column of a type."""
    schema = pa.schema({"candidates": pa.list_(pa.struct({"x": kind}))})
    return written({"candidates": [{"x": value}]}, schema=schema)


def with_extension() -> bytes:
    """A request whose one column has a type that Arrow makes of another."""
    column = pa.ExtensionArray.from_storage(pa.json_(), pa.array(["1"]))
    record = pa.StructArray.from_arrays([column], ["x"])
    return stream(pa.record_batch({"candidates": pa.ListArray.from_arrays([0, 1], record)}))


WRONG: list[tuple[str, bytes, list[Any], str]] = [
    ("nothing", b"", ["body"], "arrow_invalid"),
    ("JSON", b'{"candidates": [{}]}', ["body"], "arrow_invalid"),
    ("a schema alone", stream(pa.RecordBatch.from_pylist([ASKED]))[:-8][:500], ["body"], "arrow_invalid"),
    ("half of it", written(ASKED)[:900], ["body"], "arrow_invalid"),
    ("two batches", written(ASKED)[:-8] + written(ASKED)[552:], ["body"], "arrow_invalid"),
    ("no row", written(schema=pa.RecordBatch.from_pylist([ASKED]).schema), ["body"], "arrow_invalid"),
    ("too many rows", written(*[ASKED] * 5), ["requests"], "too_many_requests"),
    ("too many candidates", written(*[{"candidates": [{"x": 1}] * 30}] * 4), ["candidates"], "too_many_candidates"),
    ("no candidates column", written({"user": {"a": 1}}), ["candidates"], "missing"),
    ("an unknown column", written({**ASKED, "debug": True}), ["debug"], "extra_forbidden"),
    ("text for candidates", written({"candidates": "x"}), ["candidates"], "arrow_type"),
    ("a number for a request id", written({**ASKED, "request_id": 7}), ["request_id"], "arrow_type"),
    ("null for a candidate", written({"candidates": [{"x": 1}, None]}), ["candidates"], "dict_type"),
    ("infinity", written({"candidates": [{"x": np.inf}]}), ["candidates", "x"], "finite_number"),
    ("infinity in a list", written({"candidates": [{"x": [1.0, -np.inf]}]}), ["candidates", "x"], "finite_number"),
    ("lz4", written(ASKED, compression="lz4"), ["body"], "arrow_invalid"),
    ("zstd", written(ASKED, compression="zstd"), ["body"], "arrow_invalid"),
    ("a dictionary", typed(pa.dictionary(pa.int8(), pa.string()), "a"), ["body"], "arrow_invalid"),
    ("a view", typed(pa.string_view(), "a"), ["candidates", "x"], "arrow_type"),
    ("a list view", typed(pa.list_view(pa.int8()), [1]), ["candidates", "x"], "arrow_type"),
    ("bytes", typed(pa.binary(), b"a"), ["candidates", "x"], "arrow_type"),
    ("bytes of no length", typed(pa.binary(0), b""), ["candidates", "x"], "arrow_type"),
    ("a struct", typed(pa.struct({"y": pa.int8()}), {"y": 1}), ["candidates", "x"], "arrow_type"),
    ("a list of lists", typed(pa.list_(pa.list_(pa.int8())), [[1]]), ["candidates", "x"], "arrow_type"),
    ("a map", typed(pa.map_(pa.string(), pa.int8()), [("a", 1)]), ["candidates", "x"], "arrow_type"),
    ("an extension type", with_extension(), ["candidates", "x"], "arrow_type"),
    ("a time", typed(pa.timestamp("us"), 1), ["candidates", "x"], "arrow_type"),
    ("1,001 columns", written({"candidates": [{str(i): 1 for i in range(1001)}]}), ["body"], "arrow_invalid"),
]


@pytest.mark.parametrize(("body", "path", "kind"), [w[1:] for w in WRONG], ids=[w[0] for w in WRONG])
def test_a_wrong_stream_is_refused_for_what_it_is(body: bytes, path: list[Any], kind: str) -> None:
    found = refused(body)
    assert (found.loc, found.type) == (path, kind)


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"candidates": None}, "missing"),
        ({"candidates": []}, "too_short"),
        ({"candidates": ASKED["candidates"] * 30}, "too_many_candidates"),
        ({"request_id": "a b"}, "string_pattern_mismatch"),
    ],
)
def test_a_wrong_row_is_refused_alone(change: dict[str, Any], kind: str) -> None:
    good, bad = parse(written(ASKED, {**ASKED, **change}), **LIMITS)
    assert isinstance(good, Question)
    assert isinstance(bad, Refused)
    assert bad.problems[0].type == kind


def with_number(body: bytes, old: int, new: int) -> list[bytes]:
    """Bodies in which one 64-bit number is another, wherever it stands."""
    found, wanted = [], struct.pack("<q", old)
    at = body.find(wanted)
    while at >= 0:
        found.append(body[:at] + struct.pack("<q", new) + body[at + 8 :])
        at = body.find(wanted, at + 1)
    return found


def test_lengths_that_lie_allocate_nothing() -> None:
    nulls = {"candidates": [{"x": None, "tags": [None] * 7}] * 13}
    bodies = [written(ASKED), written(nulls), written(*[nulls] * 3)]
    tried = 0
    tracemalloc.start()
    try:
        for body in bodies:
            for old in (1, 2, 3, 7, 13, 39, 91, 273):
                for new in (2**31 - 1, 2**40, 2**62, -1):
                    for lie in with_number(body, old, new):
                        tried += 1
                        with suppress(Refused):
                            parse(lie, **LIMITS)
        assert tracemalloc.get_traced_memory()[1] < 20 * 2**20
    finally:
        tracemalloc.stop()
    assert tried > 50
    assert pa.default_memory_pool().max_memory() < 2**28


def test_columns_can_not_share_a_large_buffer() -> None:
    """One text of the body, named by every column, would be worth many bodies."""
    body = written({"candidates": [{name: "x" * 5000 for name in "abcdefgh"}]})
    batch = pa.ipc.open_stream(body).read_next_batch()
    buffers = [b for b in batch.columns[0].buffers() if b is not None and b.size == 5000]
    places = [b.address - pa.py_buffer(body).address for b in buffers]
    start = pa.ipc.MessageReader.open_stream(body)
    start.read_next_message()
    message = start.read_next_message()
    data = body.find(message.body.to_pybytes())
    shared = body
    for place in places:
        old, new = struct.pack("<qq", place - data, 5000), struct.pack("<qq", places[0] - data, 40_000)
        assert shared.count(old) == 1
        shared = shared.replace(old, new)
    pa.ipc.open_stream(shared).read_next_batch().validate(full=True)  # Arrow itself finds nothing wrong
    assert "buffers share bytes" in refused(shared).msg


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    folder: Path = tmp_path_factory.mktemp("arrow")
    example_bundle(folder / "bundle")
    app = create_app(Settings(model=(str(folder / "bundle"),), max_candidates=200, max_batch_requests=5))
    with TestClient(app) as client:
        while client.get("/readyz").status_code != 200:
            pass
        yield client


def post(client: TestClient, body: bytes, path: str = "/v1/score", **headers: str) -> Any:
    return client.post(path, content=body, headers={"Content-Type": ARROW, **headers})


def rows_of(reply: Any) -> list[dict[str, Any]]:
    assert (reply.status_code, reply.headers["content-type"]) == (200, ARROW)
    table = pa.ipc.open_stream(reply.content).read_all()
    table.validate(full=True)
    assert table.schema == REPLY
    return table.to_pylist(maps_as_pydicts="strict")


def test_arrow_scores_as_json_does(client: TestClient) -> None:
    asked = {**ASKED, "candidates": example_log(150, seed=5).select("item_id", "price", "tags").to_dicts()}
    plain = client.post("/v1/score", json=asked).json()
    assert post(client, written(asked)).json() == plain
    (row,) = rows_of(post(client, written(asked), Accept=ARROW))
    assert row["scores"] == pytest.approx(plain["scores"], abs=1e-7)
    assert (row["status"], row["request_id"], row["model"]) == (200, "r-1", plain["model"])
    assert (row["experiments"], row["positions"], row["features"], row["detail"]) == (None,) * 4
    (other,) = rows_of(client.post("/v1/score", json=asked, headers={"Accept": ARROW}))
    assert other == row


def test_errors_are_json_and_have_a_path(client: TestClient) -> None:
    reply = post(client, written({"candidates": [{"prize": 1}]}), Accept=ARROW)
    assert reply.status_code == 422
    assert reply.json()["detail"][0]["loc"] == ["candidates", 0, "prize"]
    reply = post(client, written({"candidates": [{"price": "1"}, {"price": "cheap"}]}))
    assert reply.json()["detail"][0]["loc"] == ["candidates", 1, "price"]
    assert post(client, written(ASKED, ASKED)).json()["detail"][0]["type"] == "too_many_requests"


def test_a_batch_in_arrow_tells_of_each_row(client: TestClient) -> None:
    bad = {**ASKED, "user": {"user_id": 2**62, "clicked": ["a"]}, "request_id": "r-2", "candidates": []}
    one, two = rows_of(post(client, written(ASKED, bad), "/v1/score:batch", Accept=ARROW))
    assert (one["status"], len(one["scores"]), one["detail"]) == (200, 2, None)
    assert (two["status"], two["scores"], two["model"]) == (422, None, None)
    assert two["detail"][0]["type"] == "too_short"


MUTATION = st.tuples(
    st.floats(0, 1, exclude_max=True),
    st.sampled_from(["set", "cut", "insert", "number", "swap"]),
    st.integers(-(2**63), 2**63 - 1),
)


def mutated(body: bytes, changes: list[tuple[float, str, int]]) -> bytes:
    raw = bytearray(body)
    for place, how, value in changes:
        at = int(place * len(raw))
        if how == "set" and raw:
            raw[at] = value & 255
        elif how == "cut":
            del raw[at : at + (value & 63)]
        elif how == "insert":
            raw[at:at] = bytes(value & 7)
        elif how == "number":
            aligned = at - at % 4
            size = (1, 2, 4, 8)[value & 3]
            raw[aligned : aligned + size] = (value >> 2 & 2 ** (8 * size) - 1).to_bytes(size, "little")
        else:
            raw[at : at + 8], raw[:8] = raw[:8], raw[at : at + 8]
    return bytes(raw)


def test_no_mutation_breaks_the_reader(client: TestClient, request: pytest.FixtureRequest) -> None:
    large = pa.large_list(pa.struct({"item_id": pa.large_string(), "tags": pa.large_list(pa.large_string())}))
    seeds = [
        written(ASKED),
        written(ASKED, {**ASKED, "user": None}, ASKED),
        written({"candidates": [{"item_id": "a", "tags": ["b"]}]}, schema=pa.schema({"candidates": large})),
        written({"candidates": [{"price": None, "tags": [None]}]}),
        written(ASKED, compression="lz4"),
        typed(pa.dictionary(pa.int8(), pa.string()), "a"),
    ]
    statuses: dict[int, int] = {}

    @settings(
        max_examples=request.config.getoption("--fuzz-examples"),
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    @given(st.sampled_from(seeds), st.lists(MUTATION, min_size=1, max_size=6))
    def run(seed: bytes, changes: list[tuple[float, str, int]]) -> None:
        body = mutated(seed, changes)
        for path in ("/v1/score", "/v1/score:batch"):
            reply = post(client, body, path, Accept=ARROW)
            assert reply.status_code in (200, 404, 413, 422), reply.text
            statuses[reply.status_code] = statuses.get(reply.status_code, 0) + 1
            if reply.status_code == 200:
                for row in rows_of(reply):
                    assert row["scores"] is None or np.isfinite(row["scores"]).all()

    run()
    assert statuses[422] > 10
    expected = client.post("/v1/score", json=ASKED).json()["scores"]
    (row,) = rows_of(post(client, written(ASKED), Accept=ARROW))
    assert row["scores"] == pytest.approx(expected, abs=1e-7)
