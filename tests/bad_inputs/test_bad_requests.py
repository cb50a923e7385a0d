"""What a wrong request is told, word for word: status, path of the field, message."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from pipelines.release.example import example_bundle
from serving.app import create_app
from serving.settings import Settings

COLUMNS = "known: 'city', 'clicked', 'hour', 'item_id', 'price', 'tags', 'user_id'"
NO_NUMBER = "NaN and Infinity are no values; leave the column out, or give null, when it is missing"
BODY_LIMIT = 12_000_000


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    bundle: Path = tmp_path_factory.mktemp("made") / "bundle"
    example_bundle(bundle)
    settings = Settings(model=str(bundle), max_candidates=3, max_body_bytes=BODY_LIMIT)
    with TestClient(create_app(settings)) as client:
        until = time.monotonic() + 60
        while client.get("/readyz").status_code != 200:
            assert time.monotonic() < until
            time.sleep(0.05)
        yield client


# (what, body, path, message)
REQUESTS: list[tuple[str, Any, list[Any], str]] = [
    ("no body", b"", ["body"], "not valid JSON: EOF while parsing a value at line 1 column 0"),
    ("half a body", b'{"candidates": [', ["body"], "not valid JSON: EOF while parsing a list at line 1 column 16"),
    ("a list", [], ["body"], "expected an object, got a list"),
    ("an empty object", {}, ["candidates"], "required field is missing"),
    (
        "an unknown field",
        {"candidates": [{}], "usr": {}},
        ["usr"],
        "no such field; did you mean 'user'? known: 'candidates', 'context', 'model', 'request_id', 'user'",
    ),
    (
        "an unknown column",
        {"candidates": [{}, {"item": "x"}]},
        ["candidates", 1, "item"],
        f"no feature has this name; did you mean 'item_id'? {COLUMNS}",
    ),
    ("no candidate", {"candidates": []}, ["candidates"], "no candidates; at least one is needed"),
    ("a candidate that is none", {"candidates": [3]}, ["candidates", 0], "expected an object, got a number"),
    ("too many candidates", {"candidates": [{}] * 4}, ["candidates"], "4 candidates, at most 3 are allowed"),
    ("NaN", b'{"candidates": [{"price": NaN}]}', ["candidates", 0, "price"], NO_NUMBER),
    ("a number that overflows", b'{"candidates": [{"price": 1e999}]}', ["candidates", 0, "price"], NO_NUMBER),
    (
        "text for a number",
        {"candidates": [{"price": "cheap"}]},
        ["candidates", 0, "price"],
        "expected a number, found 'cheap'; give a number, or null when it is not known",
    ),
    (
        "text for a whole number",
        {"user": {"user_id": "me"}, "candidates": [{}]},
        ["user", "user_id"],
        "expected an integer, found 'me'; give an integer, or null when it is not known",
    ),
    (
        "a user id of 5,000 digits",
        b'{"user": {"user_id": ' + b"9" * 5000 + b'}, "candidates": [{}]}',
        ["body"],
        "not valid JSON: number out of range at line 1 column 4323",
    ),
    (
        "a city of 10 MB",
        {"user": {"city": "x" * 10_000_000}, "candidates": [{}]},
        ["user", "city"],
        "text of 10,000,000 characters; at most 65,536 are taken; give text, or null when it is not known",
    ),
    (
        "a list for one value",
        {"user": {"city": ["Graz"]}, "candidates": [{}]},
        ["user", "city"],
        "expected text, found a list; give text, or null when it is not known",
    ),
    (
        "one value for a list",
        {"user": {"clicked": "item-1"}, "candidates": [{}]},
        ["user", "clicked"],
        "expected a list, found text; give a list of values, oldest first in a history",
    ),
    (
        "a history without end",
        {"user": {"clicked": ["item-1"] * 200_000}, "candidates": [{}]},
        ["user", "clicked"],
        "a list of 200,000 values; at most 100,000 are taken; give a list of values, oldest first in a history",
    ),
    (
        "an object for a value",
        {"user": {"city": {"name": "Graz"}}, "candidates": [{}]},
        ["user", "city"],
        "expected text, found an object; give text, or null when it is not known",
    ),
    (
        "the answer in the question",
        {"candidates": [{"click": 1}]},
        ["candidates", 0, "click"],
        f"no feature has this name; did you mean 'clicked'? {COLUMNS}",
    ),
    (
        "a request id with a space",
        {"candidates": [{}], "request_id": "a b"},
        ["request_id"],
        "1 to 128 visible ASCII characters are allowed",
    ),
]


@pytest.mark.parametrize(
    ("body", "path", "message"), [case[1:] for case in REQUESTS], ids=[case[0] for case in REQUESTS]
)
def test_request(client: TestClient, body: Any, path: list[Any], message: str) -> None:
    answer = client.post("/v1/score", content=body if isinstance(body, bytes) else json.dumps(body))
    assert answer.status_code == 422
    problem = answer.json()["detail"][0]
    assert problem["loc"] == path
    assert problem["msg"] == message


def test_a_body_larger_than_the_limit(client: TestClient) -> None:
    answer = client.post("/v1/score", content=b'{"user": {"city": "' + b"x" * BODY_LIMIT + b'"}}')
    assert answer.status_code == 413
    (problem,) = answer.json()["detail"]
    assert problem["loc"] == ["body"]
    assert problem["msg"] == "the body is larger than 12,000,000 bytes; send fewer candidates a request"


def test_the_server_still_answers(client: TestClient) -> None:
    answer = client.post("/v1/score", json={"user": {"user_id": 3}, "candidates": [{"item_id": "item-1"}, {}]})
    assert answer.status_code == 200
    assert len(answer.json()["scores"]) == 2
