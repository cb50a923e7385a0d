"""What is let in is counted, and what has gone is not."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from starlette.requests import ClientDisconnect, Request

from serving.limits import ARROW, JSON, Admit, Intake, content_type, cross_origin, headers_of
from serving.schemas import Refused


def intake(**change: Any) -> Intake:
    return Intake(**{"requests": 2, "body_bytes": 100, "held_bytes": 150, **change})


def request(*parts: bytes, **headers: str) -> Request:
    """A request whose body comes in parts."""
    messages = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
    messages.append({"type": "http.request", "body": b"", "more_body": False})

    async def receive() -> Any:
        return messages.pop(0)

    given = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": "POST", "path": "/v1/score", "headers": given, "state": {"request_id": "r"}}
    return Request(scope, receive)


def refused(door: Intake, one: Request) -> tuple[int, str]:
    with pytest.raises(Refused) as caught:
        asyncio.run(door.read(one))
    return caught.value.status, caught.value.problems[0].type


def test_a_body_is_read_whole() -> None:
    door = intake()
    assert asyncio.run(door.read(request(b"ab", b"c", content_type="application/json"))) == b"abc"
    assert door.held == 3


def test_too_large_and_too_much() -> None:
    assert refused(intake(), request(b"x" * 60, b"x" * 60)) == (413, "too_large")
    assert refused(intake(), request(content_length="101")) == (413, "too_large")
    door = intake()
    asyncio.run(door.read(request(b"x" * 90)))
    assert refused(door, request(b"x" * 90)) == (503, "overloaded")


def test_types_and_encodings() -> None:
    assert refused(intake(), request(b"x", content_type=ARROW)) == (415, "content_type")
    assert refused(intake(), request(b"x", content_encoding="br")) == (415, "content_encoding")
    asyncio.run(intake().read(request(b"x", content_encoding="identity")))
    assert content_type({b"content-type": ARROW.encode()}, (JSON, ARROW)) == ARROW
    assert content_type({}, (JSON, ARROW)) == JSON


@pytest.mark.parametrize("ends", ["well", "error", "gone"])
def test_what_a_request_held_is_free_when_it_ends(ends: str) -> None:
    door, seen = intake(), []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await door.read(Request(scope, receive))
        seen.append((door.in_hand, door.held))
        if ends == "error":
            raise RuntimeError
        if ends == "gone":
            raise ClientDisconnect

    async def run() -> None:
        one = request(b"x" * 50)
        await Admit(app, door, lambda kind: None)(one.scope, one.receive, lambda message: None)  # type: ignore

    try:
        asyncio.run(run())
    except (RuntimeError, ClientDisconnect):
        assert ends != "well"
    assert seen == [(1, 50)]
    assert (door.in_hand, door.held) == (0, 0)


def test_of_a_header_that_comes_several_times_the_first_counts() -> None:
    scope = {"headers": [(b"content-type", b"text/html"), (b"content-type", JSON.encode()), (b"accept", b"*/*")]}
    assert headers_of(scope) == {b"content-type": b"text/html", b"accept": b"*/*"}
    assert headers_of(scope) is headers_of(scope)
    with pytest.raises(Refused):
        content_type(headers_of(scope), (JSON,))


def test_pages_of_this_server_may_ask() -> None:
    for headers in (
        {},
        {"sec_fetch_site": "same-origin", "origin": "http://a", "host": "b"},  # behind a proxy
        {"sec_fetch_site": "none"},
        {"origin": "http://localhost:8000", "host": "localhost:8000"},
    ):
        assert cross_origin(request(**headers).scope) is None
    for headers in (
        {"sec_fetch_site": "same-site"},
        {"origin": "http://localhost:9000", "host": "localhost:8000"},
        {"origin": "http://[", "host": "localhost:8000"},
    ):
        found = cross_origin(request(**headers).scope)
        assert found is not None
        assert found.status == 403


def test_the_pace_counts_requests_from_when_they_are_read() -> None:
    """A client that is slow to send, or to be refused, does not make the server look slow."""
    door, seen = intake(), []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        async def slow() -> Any:
            seen.append((door.in_hand, door.reading, door.pace.in_hand))
            return await receive()

        await door.read(Request(scope, slow))
        seen.append((door.in_hand, door.reading, door.pace.in_hand))

    one = request(b"x")
    asyncio.run(Admit(app, door, lambda kind: None)(one.scope, one.receive, lambda message: None))  # type: ignore
    assert seen == [(1, 1, 0), (1, 1, 0), (1, 0, 1)]
    assert (door.in_hand, door.reading, door.pace.in_hand) == (0, 0, 0)
    assert refused(door, request(b"x" * 101)) == (413, "too_large")
    assert (door.reading, door.pace.in_hand) == (0, 0)
