"""The Open Inference Protocol, spoken by Triton's own client, and by hand where a client would not."""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import polars as pl
import pytest
from fastapi.testclient import TestClient

from pipelines.release.bundle import SCORE, Bundle
from pipelines.release.example import example_bundle
from serving import open_inference
from serving.app import create_app
from serving.aside import LARGE
from serving.open_inference import decode
from serving.schemas import Refused
from serving.settings import Settings
from tests.serving.waiting import until

triton = pytest.importorskip("tritonclient.http", reason="tritonclient[http] is not installed")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return example_bundle(tmp_path_factory.mktemp("made") / "bundle")


@pytest.fixture(scope="module")
def address(bundle: Bundle, listening: Callable[..., AbstractContextManager[int]]) -> Iterator[str]:
    """A real server, since Triton's client brings its own connections."""
    settings = Settings(model=f"clicks={bundle.directory}", max_candidates=50)
    with listening(create_app(settings)) as port:
        yield f"127.0.0.1:{port}"


@pytest.fixture(scope="module")
def client(address: str) -> Any:
    client = triton.InferenceServerClient(address)
    assert client.is_server_ready()
    return client


def tensors(frame: pl.DataFrame, *, binary: bool) -> list[Any]:
    """The golden rows' columns as a client sends them."""
    made = []
    for column in frame:
        if column.dtype == pl.List:
            rows = [row or [] for row in column.to_list()]
            longest = max(1, *map(len, rows))
            values = np.array([[*map(str, row), *[""] * (longest - len(row))] for row in rows], dtype=object)
            kind = "BYTES"
        elif column.dtype == pl.String:
            values, kind = column.fill_null("").to_numpy().astype(object), "BYTES"
        elif column.dtype.is_integer():
            values, kind = column.to_numpy().astype(np.int64), "INT64"
        else:
            values, kind = column.fill_null(np.nan).to_numpy().astype(np.float64), "FP64"
        one = triton.InferInput(column.name, list(values.shape), kind)
        one.set_data_from_numpy(values, binary_data=binary)
        made.append(one)
    return made


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("version", ["", "own"])
def test_a_real_client_gets_the_golden_scores(client, bundle, binary, version) -> None:
    # Whole numbers know no missing value in the protocol.
    whole = [column for column, dtype in bundle.golden.schema.items() if dtype.is_integer()]
    golden = bundle.golden.drop_nulls(whole).head(40)
    answer = client.infer(
        "clicks",
        tensors(golden.drop(SCORE), binary=binary),
        model_version=bundle.hash[:12] if version else "",
        request_id="mine",
        outputs=[triton.InferRequestedOutput("score", binary_data=binary)],
    )
    np.testing.assert_allclose(answer.as_numpy("score"), golden[SCORE].to_numpy(), atol=1e-6)
    told = answer.get_response()
    assert (told["model_name"], told["model_version"], told["id"]) == ("clicks", bundle.hash[:12], "mine")


def test_a_real_client_learns_what_there_is(client, bundle) -> None:
    assert client.is_server_live()
    assert client.is_model_ready("clicks")
    assert not client.is_model_ready("clisk")
    assert client.get_server_metadata()["extensions"] == ["binary_tensor_data"]
    told = client.get_model_metadata("clicks")
    assert {one["name"] for one in told["inputs"]} == set(bundle.golden.columns) - {SCORE}
    assert {one["name"]: one["datatype"] for one in told["inputs"]}["price"] == "FP64"
    assert told["outputs"] == [{"name": "score", "datatype": "FP32", "shape": [-1]}]


def test_a_real_client_is_told_what_is_wrong(client) -> None:
    one = triton.InferInput("price", [1], "FP64")
    one.set_data_from_numpy(np.ones(1))
    with pytest.raises(triton.InferenceServerException, match="no model 'clisk'"):
        client.infer("clisk", [one])
    with pytest.raises(triton.InferenceServerException, match="no model 'clicks' of version '7'"):
        client.infer("clicks", [one], model_version="7")
    other = triton.InferInput("prise", [1], "FP64")
    other.set_data_from_numpy(np.ones(1))
    with pytest.raises(triton.InferenceServerException, match="no input 'prise'; did you mean 'price'"):
        client.infer("clicks", [other])
    assert client.infer("clicks", [one]).as_numpy("score").shape == (1,)  # the other columns are missing


COLUMNS = {"price": False, "city": False, "tags": True}


def price(**changes: Any) -> dict[str, Any]:
    return {"name": "price", "shape": [2], "datatype": "FP32", "data": [1.0, 2.0], **changes}


def asked(*inputs: Any, tail: bytes = b"", **more: Any) -> tuple[bytes, str | None]:
    text = json.dumps({"inputs": list(inputs), **more}).encode()
    return text + tail, str(len(text)) if tail else None


def test_texts_histories_and_missing_values() -> None:
    tags = {"name": "tags", "shape": [2, 3], "datatype": "BYTES", "data": [["a", "b", ""], ["", "", ""]]}
    city = {"name": "city", "shape": [2, 1], "datatype": "BYTES", "data": ["Graz", None]}
    frame = decode(*asked(price(data=[None, 2]), city, tags), COLUMNS, max_rows=9).frame
    assert frame["tags"].to_list() == [["a", "b"], []]
    assert frame["city"].to_list() == ["Graz", None]
    assert np.isnan(frame["price"][0])
    none = {"name": "tags", "shape": [2, 0], "datatype": "BYTES", "data": []}
    assert decode(*asked(none), COLUMNS, max_rows=9).frame["tags"].to_list() == [[], []]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((b"{", None), "not valid JSON"),
        ((b"[]", None), "expected an object, got a list"),
        ((b"{}", "7"), "inference-header-content-length is '7', the body has 2 bytes"),
        ((b"{}", "-1"), "inference-header-content-length"),
        ((b"{}", "²"), "inference-header-content-length"),
        (asked(), "inputs must be a list of tensors"),
        (asked(3), "inputs must be a list of tensors"),
        (asked(price(name="pirce")), "no input 'pirce'; did you mean 'price'"),
        (asked(price(name=None)), "no input None"),
        (asked(price(), price()), "input 'price' is given twice"),
        (asked(price(datatype="FP33")), "no datatype 'FP33'"),
        (asked(price(datatype=None)), "no datatype None"),
        (asked(price(shape=[2, 2])), r"shape must be \[rows\], got \[2, 2\]"),
        (asked(price(shape=["2"])), "shape must be a list of sizes"),
        (asked(price(shape=[True])), "shape must be a list of sizes"),
        (asked(price(shape=[-2])), "shape must be a list of sizes"),
        (asked(price(shape=[10])), "10 rows, 1 to 9 are allowed"),
        (asked(price(shape=[0], data=[])), "0 rows"),
        (asked(price(data=[1.0])), "1 values, its shape holds 2"),
        (asked(price(data=None)), "data must be a list"),
        (asked(price(data=["x", "y"])), "'x' is no FP32"),
        (asked(price(data=[True, 1])), "True is no FP32"),
        (asked(price(datatype="INT8", data=[1, 300])), "input 'price'"),
        (asked(price(datatype="INT64", data=[1, None])), "input 'price'"),
        (asked(price(datatype="INT64", data=[1, 2.5])), "2.5 is no INT64"),
        (asked(price(datatype="FP64", data=[1, 10**400])), "input 'price': int too large"),
        (asked(price(datatype="BOOL", data=[True, None])), "None is no BOOL"),
        (asked(price(data=[[1.0], 2.0])), r"\[1.0\] is no FP32"),
        (
            asked(price(), {"name": "city", "shape": [1], "datatype": "BYTES", "data": ["x"]}),
            "differ in their number",
        ),
        (asked(price(), id=3), "id must be text"),
        (asked(price(), outputs=[{"name": "logit"}]), "no output 'logit'"),
        (asked(price(), outputs=3), "outputs must be a list"),
        (
            asked(price(parameters={"binary_data_size": 8}), tail=b"1234567"),
            "binary_data_size 8, 7 bytes are there",
        ),
        (asked(price(parameters={"binary_data_size": 7}), tail=b"1234567"), "7 bytes, 8 make up its shape"),
        (asked(price(parameters={"binary_data_size": 8}), tail=b"123456789"), "1 bytes are left over"),
        (asked(price(parameters={"binary_data_size": "8"}), tail=b"12345678"), "binary_data_size '8'"),
        (
            asked(price(name="city", datatype="BYTES", parameters={"binary_data_size": 9}), tail=b"\5\0\0\0abcde"),
            "do not hold 2 texts",
        ),
        (
            asked(
                price(name="city", shape=[1], datatype="BYTES", parameters={"binary_data_size": 8}),
                tail=struct.pack("<I", 2**32 - 1) + b"abcd",
            ),
            "do not hold 1 texts",
        ),
        (
            asked(
                price(name="city", shape=[1], datatype="BYTES", parameters={"binary_data_size": 6}),
                tail=struct.pack("<I", 2) + b"\xff\xfe",
            ),
            "not UTF-8",
        ),
    ],
)
def test_what_breaks_the_protocol(given, message) -> None:
    with pytest.raises(Refused, match=message):
        decode(*given, COLUMNS, max_rows=9)


def test_what_is_repeated_of_a_request_is_not_long() -> None:
    for wrong in (
        price(name="p" * 10**6),
        price(datatype="x" * 10**6),
        price(shape=[1] * 10**5),
        price(data=["x" * 10**6] * 2),
    ):
        with pytest.raises(Refused) as caught:
            decode(*asked(wrong), COLUMNS, max_rows=9)
        assert len(str(caught.value)) < 1100


def test_many_values_are_the_same_as_few() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(9, 5000)).round(3)
    rows[rng.random(rows.shape) < 0.1] = np.nan
    plain = [[None if np.isnan(v) else v for v in row] for row in rows.tolist()]
    tags = {"name": "tags", "shape": [9, 5000], "datatype": "FP64"}
    wanted = [[v for v in row if v is not None] for row in plain]
    for data in (plain, [v for row in plain for v in row]):
        assert decode(*asked({**tags, "data": data}), COLUMNS, max_rows=9).frame["tags"].to_list() == wanted


def test_a_large_body_is_not_read_where_others_wait(bundle, monkeypatch) -> None:
    where = {}

    def noted(body: bytes, *rest: Any, **more: Any) -> Any:
        where[len(body) > LARGE] = asyncio._get_running_loop()
        return decode(body, *rest, **more)

    monkeypatch.setattr(open_inference, "decode", noted)
    app = create_app(Settings(model=f"clicks={bundle.directory}"))
    with TestClient(app) as client:
        until(lambda: client.get("/v2/health/ready").status_code == 200)
        tags = {"name": "tags", "shape": [2, 20_000], "datatype": "BYTES", "data": ["a"] * 40_000}
        for inputs in ([price()], [price(), tags]):
            answer = client.post("/v2/models/clicks/infer", json={"inputs": inputs})
            assert answer.status_code == 200, answer.text
    assert where[False] is not None
    assert where[True] is None


def test_a_deadline_that_has_passed_and_one_that_is_none(bundle, ready, served, tmp_path) -> None:
    rows = [{"name": name, "shape": [2], "datatype": "INT64", "data": [3, 4]} for name in ("user_id", "item_id")]
    kept = {"events_url": f"sqlite:///{tmp_path}/events.db", "events_spool": tmp_path / "spool"}
    with TestClient(create_app(Settings(model=f"clicks={bundle.directory}", **kept))) as client:

        def infer(*inputs: Any, deadline: str) -> Any:
            headers = {"X-Deadline-Ms": deadline}
            return client.post("/v2/models/clicks/infer", json={"inputs": inputs}, headers=headers)

        ready(client)
        for inputs in (rows[1:], rows):  # of one user, and of several
            late = infer(*inputs, deadline="0.001")
            assert (late.status_code, late.json()["detail"][0]["type"]) == (504, "deadline_passed")
            assert late.json()["error"] == late.json()["detail"][0]["msg"]
            assert infer(*inputs, deadline="60000").status_code == 200
        assert served == [False, True, False, True]
        wrong = infer(rows[1], deadline="soon")
        assert wrong.status_code == 400
        assert wrong.json()["error"].startswith("header.X-Deadline-Ms: expected milliseconds")
        for path in ("", "/versions/{version}"):
            told = client.get("/openapi.json").json()["paths"][f"/v2/models/{{name}}{path}/infer"]["post"]
            assert "504" in told["responses"]
            assert "x-deadline-ms" in {parameter["name"] for parameter in told["parameters"]}


def test_random_bytes_never_break_the_server(bundle) -> None:
    """Whatever stands in a body, the answer is a score or a reason."""
    rng = np.random.default_rng(0)
    whole, header = asked(price(parameters={"binary_data_size": 8}), tail=b"12345678")
    with TestClient(
        create_app(Settings(model=f"clicks={bundle.directory}")), raise_server_exceptions=False
    ) as client:
        until(lambda: client.get("/v2/health/ready").status_code == 200)
        statuses = []
        for _ in range(300):
            broken = bytearray(whole)
            for place in rng.integers(0, len(broken), rng.integers(1, 6)):
                broken[place] = rng.integers(0, 256)
            headers = {"inference-header-content-length": str(header)}
            answer = client.post("/v2/models/clicks/infer", content=bytes(broken), headers=headers)
            statuses.append(answer.status_code)
            assert answer.status_code in (200, 400), answer.text
            assert answer.status_code == 200 or answer.json()["error"]
        assert set(statuses) == {200, 400}
        told = client.get("/metrics").text
        assert f"sluice_candidates_total {2.0 * statuses.count(200)}\n" in told
        assert 'sluice_errors_total{reason="protocol"}' in told
        for path in ("/v2/models/clicks/infer", "/v2/models/clicks/versions/1/infer"):
            assert client.post(path, content=b"").status_code in (400, 404)
