"""Requests are checked before anything is encoded, and every complaint has a path."""

from __future__ import annotations

import json
import time
from typing import Any

import msgspec
import pytest

from ctr_models.errors import RequestError
from serving.schemas import (
    ModelCard,
    Question,
    Refused,
    examine,
    parse_batch,
    parse_request,
    read_object,
    refused_value,
)

COLUMNS = ("user_id", "hour", "item_id", "price", "tags", "a.b")


def refused(body: bytes | Any, limit: int = 3) -> Refused:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    with pytest.raises(Refused) as caught:
        parse_request(raw, max_candidates=limit)
    return caught.value


def test_a_good_request_passes() -> None:
    body = {"user": {"user_id": 7}, "candidates": [{"price": 1.5, "tags": ["a"]}, {}], "request_id": "r-1"}
    request = parse_request(json.dumps(body).encode(), max_candidates=2)
    assert request.user == {"user_id": 7}
    assert request.context == {}
    assert request.candidates == [{"price": 1.5, "tags": ["a"]}, {}]
    assert request.request_id == "r-1"


BAD = [
    (b"", ["body"], "json_invalid", "not valid JSON"),
    (b'{"candidates": [', ["body"], "json_invalid", "not valid JSON"),
    (b"\xff\xfe", ["body"], "json_invalid", "not valid JSON"),
    (b"[1]", ["body"], "object_type", "expected an object, got a list"),
    ({}, ["candidates"], "missing", "required field is missing"),
    ({"candidates": []}, ["candidates"], "too_short", "no candidates; at least one is needed"),
    ({"candidates": {}}, ["candidates"], "list_type", "expected a list, got an object"),
    ({"candidates": [{}, 3]}, ["candidates", 1], "dict_type", "expected an object, got a number"),
    ({"candidates": [{}] * 4}, ["candidates"], "too_many_candidates", "4 candidates, at most 3 are allowed"),
    ({"candidates": [{}], "usr": {}}, ["usr"], "extra_forbidden", "no such field; did you mean 'user'?"),
    ({"candidates": [{}], "user": None}, ["user"], "dict_type", "expected an object, got null"),
    (
        {"candidates": [{}], "request_id": "a b"},
        ["request_id"],
        "string_pattern_mismatch",
        "1 to 128 visible ASCII characters are allowed",
    ),
    (b'{"candidates": [{"price": NaN}]}', ["candidates", 0, "price"], "finite_number", "NaN and Infinity"),
    (b'{"candidates": [{"price": 1e999}]}', ["candidates", 0, "price"], "finite_number", "NaN and Infinity"),
    (b'{"candidates": [{"tags": [1, -Infinity]}]}', ["candidates", 0, "tags", 1], "finite_number", "NaN and"),
]


@pytest.mark.parametrize(("body", "path", "kind", "message"), BAD)
def test_a_bad_request_is_refused_with_its_path(body: Any, path: list[Any], kind: str, message: str) -> None:
    error = refused(body)
    assert error.status == 422
    first = error.problems[0]
    assert (first.loc, first.type) == (path, kind)
    assert message in first.msg


def test_problems_are_reported_together_but_not_endlessly() -> None:
    error = refused(b'{"candidates": [{"price": NaN}, {"tags": [NaN, 1, Infinity]}]}')
    assert [p.loc for p in error.problems] == [
        ["candidates", 0, "price"],
        ["candidates", 1, "tags", 0],
        ["candidates", 1, "tags", 2],
    ]
    many = refused(b'{"candidates": [{"tags": [' + b"NaN, " * 50 + b"1]}]}")
    assert len(many.problems) == 10


@pytest.mark.parametrize(
    ("where", "path"),
    [
        ("user.user_id", ["user", "user_id"]),
        ("candidates.3.price", ["candidates", 3, "price"]),
        ("candidates.3.tags.2", ["candidates", 3, "tags", 2]),
        ("candidates.0.a.b", ["candidates", 0, "a.b"]),
    ],
)
def test_the_encoders_complaint_becomes_a_path(where: str, path: list[Any]) -> None:
    error = refused_value(RequestError("expected a number, got text", where=where, remedy="send 1.5"), COLUMNS)
    assert error.problems[0].loc == path
    assert error.problems[0].msg == "expected a number, got text; send 1.5"


@pytest.mark.parametrize(
    "body",
    [
        b'{"candidates": [{"id": 123456789012345678901234567890, "a": -0, "b": 18446744073709551616}]}',
        b'{"candidates": [{"x": 0.1, "y": 1e-320, "z": 123456789.123456789e5, "n": null, "t": true}]}',
        '{"candidates": [{"x": "Łódź \\u0041\\ud83d\\ude00"}], "user": {"a": [1, "b", null]}}'.encode(),
        b'{"candidates": [{"x": 1, "x": 2}], "context": {}, "model": "b", "request_id": "r~1"}',
    ],
)
def test_the_quick_reader_and_the_slow_one_read_the_same(body: bytes) -> None:
    quick, slow = parse_request(body, max_candidates=3), examine(read_object(body))
    assert quick == slow
    assert [type(v) for v in quick.candidates[0].values()] == [type(v) for v in slow.candidates[0].values()]


MANY = 100_000
BOMBS = {
    "NaN in a candidate": b'{"candidates": [{"a": [' + b"NaN," * MANY + b"1]}]}",
    "NaN of a user": b'{"candidates": [{}], "user": {"a": [' + b"NaN," * MANY + b"1]}}",
    "numbers for candidates": b'{"candidates": [' + b"1," * MANY + b"1]}",
    "unknown names": b'{"candidates": [{}],' + b",".join(b'"%x": 1' % i for i in range(MANY)) + b"}",
}


@pytest.mark.parametrize("body", BOMBS.values(), ids=BOMBS)
def test_what_is_wrong_a_hundred_thousand_times_costs_no_more_than_to_read_it(body: bytes) -> None:
    begin = time.process_time()
    read_object(body)
    reading = time.process_time() - begin
    begin = time.process_time()
    error = refused(body)
    assert time.process_time() - begin < 0.1 + 20 * reading
    assert 1 <= len(error.problems) <= 10


def test_a_request_of_a_batch_that_holds_nan_is_refused_alone() -> None:
    body = b'{"requests": [{"candidates": [{"a": NaN}]}, {"candidates": [{"a": 1}]}, 3, {"candidates": [{}, {}]}]}'
    bad, good, none, large = parse_batch(body, max_requests=4, max_candidates=1, most=9)
    assert isinstance(bad, Refused)
    assert bad.problems[0].loc == ["candidates", 0, "a"]
    assert good == Question([{"a": 1}])
    assert isinstance(none, Refused)
    assert none.problems[0].type == "object_type"
    assert isinstance(large, Refused)
    assert large.problems[0].type == "too_many_candidates"


def test_a_card_is_written_once_and_shown_often() -> None:
    card = ModelCard(name='cl"icks', version=None, hash="ab", gates={"cross": "none:cd"})
    assert card.shown is card.shown
    told = msgspec.json.encode({"model": card.shown})
    assert json.loads(told) == {"model": card.model_dump()}
    assert ModelCard.model_validate(card.model_dump()) == card
