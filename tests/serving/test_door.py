"""What is turned away at the door is told what others are told, and costs nearly nothing."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest

from serving.door import SKIPPED, Door
from serving.limits import Intake, refusal
from serving.schemas import overloaded

LENGTH = (b"content-length", b"12")


def intake(requests: int) -> Intake:
    return Intake(requests=requests, body_bytes=100, held_bytes=100)


def told(answer: bytes) -> tuple[bytes, dict[str, str], Any]:
    head, _, body = answer.partition(b"\r\n\r\n")
    status, *lines = head.split(b"\r\n")
    headers = dict(line.decode().split(": ", 1) for line in lines)
    assert int(headers.pop("content-length")) == len(body)
    return status, headers, json.loads(body)


def ask(target: bytes = b"/v1/score", *headers: tuple[bytes, bytes]) -> tuple[bytes, bool]:
    answer = Door(intake(4), lambda: None)(4, b"POST", target, headers)
    assert answer is not None
    return answer


@pytest.mark.parametrize("path", ["/v1/score", "/v2/models/clicks/infer"])
@pytest.mark.parametrize("name", ["mine", 'a"b\\c', "~" * 128])
def test_the_answer_is_that_of_the_application(path: str, name: str) -> None:
    status, headers, content = told(ask(path.encode(), LENGTH, (b"x-request-id", name.encode()))[0])
    theirs = refusal(overloaded(0), {"path": path, "state": {"request_id": name}})  # type: ignore[arg-type]
    assert (status, content) == (b"HTTP/1.1 503 Service Unavailable", json.loads(bytes(theirs.body)))
    assert headers == {"retry-after": theirs.headers["retry-after"], "x-request-id": name} | {
        "content-type": "application/json"
    }


@pytest.mark.parametrize("name", [b"", b"two words", b"x" * 129, b"\xff", b"a\nb"])
def test_an_id_that_is_none_is_replaced(name: bytes) -> None:
    _, headers, content = told(ask(b"/v1/score", LENGTH, (b"x-request-id", name))[0])
    assert headers["x-request-id"] == content["request_id"]
    assert len(content["request_id"]) == 32


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [(b"transfer-encoding", b"chunked")],
        [(b"content-length", str(SKIPPED + 1).encode())],
        [(b"content-length", b"9" * 5000)],
        [LENGTH, (b"expect", b"100-continue")],
    ],
)
def test_a_body_that_can_not_be_skipped_ends_the_connection(headers: list[tuple[bytes, bytes]]) -> None:
    answer, kept = ask(b"/v1/score", *headers)
    assert not kept and told(answer)[1]["connection"] == "close"
    assert ask(b"/v1/score", LENGTH)[1]


def test_who_is_let_in() -> None:
    counted: list[int] = []
    door = Door(intake(4), lambda: counted.append(1))
    assert door(3, b"POST", b"/v1/score", [LENGTH]) is None
    assert door(999, b"GET", b"/metrics", []) is None
    assert counted == []
    assert door(4, b"PUT", b"/v1/score", [LENGTH]) is not None
    assert counted == [1]


def test_who_waits_for_a_client_is_in_nobodys_way() -> None:
    own = intake(40)
    own.pace.allowed = 10
    door = Door(own, lambda: None)
    assert door(10, b"POST", b"/v1/score", [LENGTH]) is not None
    own.reading = 25  # bodies that arrive slowly
    assert door(34, b"POST", b"/v1/score", [LENGTH]) is None
    assert door(35, b"POST", b"/v1/score", [LENGTH]) is not None
    own.reading = 40
    assert door(40, b"POST", b"/v1/score", [LENGTH]) is not None  # all that may be in hand


def test_one_line_a_second(caplog: pytest.LogCaptureFixture) -> None:
    door = Door(intake(1), lambda: None)
    with caplog.at_level(logging.WARNING, "sluice.overload"):
        for _ in range(100):
            door(7, b"POST", b"/v1/score", [LENGTH])
    assert [record.fields for record in caplog.records] == [{"refused": 1, "in_hand": 7}]  # type: ignore[attr-defined]
