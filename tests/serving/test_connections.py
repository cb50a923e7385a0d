"""What connections bear, and how requests are turned away at the door, over real connections."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from serving import connections
from serving.connections import AHEAD, _Whole

AWAY = b"HTTP/1.1 503 Away\r\ncontent-length: 2\r\n\r\nno"


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Answers with the body; ``slow`` takes a moment."""
    body, more = b"", True
    if scope["type"] != "http":
        return
    while more and scope["method"] == "POST":
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    if body == b"slow":
        await asyncio.sleep(0.3)
    if body == b"parts":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for part in (b"HTTP/1.1 ", b"", b"ends"):
            await send({"type": "http.response.body", "body": part, "more_body": part != b"ends"})
        return
    if body == b"broken":
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"9")]})
        raise RuntimeError("after the head")
    headers = [(b"content-length", str(len(body)).encode())]
    headers += [one for one in scope["headers"] if one[0] == b"x-trailer"]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def door(in_hand: int, method: bytes, target: bytes, headers: Any) -> tuple[bytes, bool] | None:
    if target == b"/busy":
        return None if in_hand == 0 else (AWAY, True)
    return {b"/no": (AWAY, True), b"/end": (AWAY, False)}.get(target)


def post(path: str, body: bytes = b"ok") -> bytes:
    return f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body


@contextmanager
def connected(port: int) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        yield client


def read(client: socket.socket, end: bytes) -> bytes:
    found = b""
    while not found.endswith(end):
        part = client.recv(65536)
        assert part, found
        found += part
    return found


@pytest.fixture(scope="module")
def port(listening: Any) -> Iterator[int]:
    with listening(app, seconds=1.0, door=door) as port:
        yield port


def test_a_connection_goes_on_after_a_refusal(port: int) -> None:
    with connected(port) as client:
        for _ in range(3):
            client.sendall(post("/no"))
            assert read(client, b"no") == AWAY
            client.sendall(post("/yes", b"scored"))
            assert read(client, b"scored").startswith(b"HTTP/1.1 200")


def test_the_answer_does_not_wait_for_the_body_which_is_skipped(port: int) -> None:
    whole = post("/no", b"x" * 50_000)
    with connected(port) as client:
        client.sendall(whole[:100])
        assert read(client, b"no") == AWAY
        for begin in range(100, len(whole), 20_000):
            time.sleep(0.02)
            client.sendall(whole[begin : begin + 20_000])
        client.sendall(post("/yes", b"next"))
        assert read(client, b"next").count(b"HTTP/1.1") == 1


def test_a_body_that_does_not_come_ends_the_connection(port: int) -> None:
    with connected(port) as client:
        client.sendall(post("/no", b"x" * 100)[:-1])
        assert read(client, b"no") == AWAY
        begin = time.monotonic()
        assert client.recv(100) == b""
        assert 0.5 < time.monotonic() - begin < 8


def test_a_refusal_may_end_the_connection(port: int) -> None:
    with connected(port) as client:
        client.sendall(post("/end"))
        assert read(client, b"no") == AWAY
        assert client.recv(100) == b""


def test_no_answer_comes_before_its_turn(port: int) -> None:
    with connected(port) as client:
        client.sendall(post("/yes", b"slow") + post("/no", b"let in"))
        answers = read(client, b"let in")
        assert answers.count(b"200 OK") == 2 and answers.index(b"slow") < answers.index(b"let in")


def test_refusals_in_a_row_at_once(port: int) -> None:
    with connected(port) as client:
        client.sendall(post("/no") * 3 + post("/yes", b"last"))
        assert read(client, b"last").startswith(3 * AWAY + b"HTTP/1.1 200")


def test_what_is_in_hand_is_told(port: int) -> None:
    with connected(port) as first, connected(port) as second:
        first.sendall(post("/busy", b"slow"))
        time.sleep(0.1)
        second.sendall(post("/busy"))
        assert read(second, b"no") == AWAY
        read(first, b"slow")
        time.sleep(0.05)
        second.sendall(post("/busy", b"free"))
        read(second, b"free")


def offering(protocol: bytes, body: bytes, method: bytes = b"POST") -> bytes:
    """A request such as Java's client sends first, and browsers that want a socket."""
    head = b"%b /yes HTTP/1.1\r\nhost: x\r\nconnection: upgrade, http2-settings\r\nupgrade: %b\r\n"
    head += b"http2-settings: AAE\r\nsec-websocket-key: dGhlIHNhbXBsZQ==\r\ncontent-length: %d\r\n\r\n"
    return head % (method, protocol, len(body)) + body


@pytest.mark.parametrize("cut", [1, 40, 60, 200, -3, 10_000])
@pytest.mark.parametrize("protocol", [b"h2c", b"websocket"])
def test_who_offers_another_protocol_is_answered_in_this_one(
    port: int, cut: int, protocol: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    inner = post("/no", b"not a request, but a body")
    asked = offering(protocol, inner) + offering(protocol, b"", b"GET") + post("/yes", b"next")
    with connected(port) as client:
        client.sendall(asked[:cut])
        time.sleep(0.05)
        client.sendall(asked[cut:])
        found = read(client, b"next")
    assert found.count(b"HTTP/1.1 200") == 3
    assert found.count(b"\r\n\r\n" + inner + b"HTTP/1.1 200") == 1
    assert AWAY not in found
    assert not [record.message for record in caplog.records if record.levelno >= logging.WARNING]


def chunked(body: bytes, trailers: bytes = b"") -> bytes:
    head = b"POST /yes HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
    return head + b"%x\r\n%b\r\n0\r\n%b\r\n" % (len(body), body, trailers)


def test_what_follows_a_body_is_no_header_of_its_request(port: int) -> None:
    with connected(port) as client:
        client.sendall(chunked(b"chunk", b"x-trailer: 1\r\n"))
        assert b"x-trailer" not in read(client, b"chunk")
        client.sendall(chunked(b"next"))
        read(client, b"next")


@pytest.mark.parametrize("endless", [b"x: y\r\n" * 1000, b"x" * 6000], ids=["many", "one"])
def test_trailers_without_end_are_not_held(port: int, endless: bytes) -> None:
    with connected(port) as client:
        client.sendall(chunked(b"chunk")[:-2] + (b"" if endless[-1:] == b"\n" else b"x: "))
        sent = 0
        with pytest.raises(ConnectionError):
            while sent < 20 * 2**20:
                client.sendall(endless)
                sent += len(endless)
        # What fits into the sockets' buffers was sent, the server took no more than a head's worth.
        assert sent < 8 * 2**20


def test_requests_sent_ahead_are_few(port: int) -> None:
    """Each would be held, and a read brings thousands."""
    with connected(port) as client:
        client.sendall(post("/yes", b"slow") + post("/yes", b"ahead") * (AHEAD - 1) + post("/yes", b"last"))
        assert read(client, b"last").count(b"200 OK") == AHEAD + 1
    with connected(port) as client:
        client.sendall(post("/yes", b"slow") + post("/yes", b"ahead") * (AHEAD + 1))
        assert read(client, b"}").startswith(b"HTTP/1.1 429")
        assert client.recv(100) == b""


@pytest.fixture
def packets(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What leaves at once."""
    sent: list[bytes] = []

    class Noted:
        def __init__(self, transport: asyncio.Transport) -> None:
            self._transport = transport

        def write(self, data: bytes) -> None:
            sent.append(data)
            self._transport.write(data)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._transport, name)

    monkeypatch.setattr(connections, "_Whole", lambda transport: _Whole(Noted(transport)))  # type: ignore[arg-type]
    return sent


def test_an_answer_leaves_whole(port: int, packets: list[bytes]) -> None:
    with connected(port) as client:
        client.sendall(post("/yes", b"one") + post("/yes", b"two"))
        read(client, b"two")
        expected = b"POST /yes HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 5\r\n\r\n"
        client.sendall(expected)
        assert read(client, b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(b"three")
        read(client, b"three")
        client.sendall(post("/yes", b""))
        read(client, b"\r\n\r\n")
    assert [one[:12] for one in packets] == [
        b"HTTP/1.1 200",
        b"HTTP/1.1 200",
        b"HTTP/1.1 100",
        *[b"HTTP/1.1 200"] * 2,
    ]
    assert [one.partition(b"\r\n\r\n")[2] for one in packets] == [b"one", b"two", b"", b"three", b""]


def test_an_answer_in_parts_leaves_part_by_part(port: int, packets: list[bytes]) -> None:
    with connected(port) as client:
        client.sendall(post("/yes", b"parts"))
        assert read(client, b"0\r\n\r\n").endswith(b"9\r\nHTTP/1.1 \r\n4\r\nends\r\n0\r\n\r\n")
    assert packets[0].endswith(b"9\r\nHTTP/1.1 \r\n")


def test_a_head_without_a_body_leaves_too(port: int) -> None:
    with connected(port) as client:
        client.sendall(b"HEAD /yes HTTP/1.1\r\nhost: x\r\n\r\n")
        assert read(client, b"\r\n\r\n").startswith(b"HTTP/1.1 200")
        client.sendall(post("/yes", b"broken"))
        assert read(client, b"\r\n\r\n").startswith(b"HTTP/1.1 200")
        assert client.recv(100) == b""
    with connected(port) as client:
        client.sendall(b"HEAD /yes HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        assert read(client, b"\r\n\r\n").startswith(b"HTTP/1.1 200")
        assert client.recv(100) == b""
