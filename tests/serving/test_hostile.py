"""Hostile requests, byte for byte over real connections: each is refused for what it is, and the server goes on."""

# ruff: noqa: E501
from __future__ import annotations

import gzip
import json
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipelines.release.example import example_bundle
from serving.app import create_app
from serving.security import KeyFile, new_key
from serving.settings import Settings
from tests.serving.waiting import until

TOKEN, KEY = new_key({"score", "admin"})
LIMITED, EVENTS_ONLY = new_key({"events"})
GOOD = b'{"user": {"user_id": 3}, "candidates": [{"item_id": "item-1", "price": 2.5}, {}]}'
BODY_BYTES = 400_000


@pytest.fixture(scope="module")
def port(listening, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    folder = tmp_path_factory.mktemp("hostile")
    example_bundle(folder / "bundle")
    KeyFile(keys=(KEY, EVENTS_ONLY)).write(folder / "keys.json")
    settings = Settings(
        model=(str(folder / "bundle"),),
        keys=folder / "keys.json",
        events_url=f"sqlite:///{folder}/events.db",
        events_spool=folder / "spool",
        max_candidates=50,
        max_body_bytes=BODY_BYTES,
        receive_seconds=1.0,
    )
    with listening(create_app(settings), seconds=1.0) as port:
        yield port


def http(
    body: bytes = b"", path: str = "/v1/score", method: str = "POST", *, length: Any = None, key: str = TOKEN,
    **headers: str | None,
) -> bytes:  # fmt: skip
    """A request as bytes; headers that are None are left out."""
    given: dict[str, str | None] = {
        "host": "localhost", "authorization": f"Bearer {key}", "content_type": "application/json",
        "content_length": str(len(body) if length is None else length),
    }  # fmt: skip
    given |= headers
    lines = [f"{method} {path} HTTP/1.1"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in given.items() if value is not None]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def scored(text: str) -> bytes:
    """A request for one candidate, given as JSON."""
    return http(b'{"candidates": [' + text.encode() + b"]}")


def chunked(*chunks: bytes, **headers: str | None) -> bytes:
    parts = [b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks]
    return http(content_length=None, transfer_encoding="chunked", **headers) + b"".join(parts) + b"0\r\n\r\n"


def tensor(path: str = "/v2/models/bundle/infer", tail: bytes = b"", head: Any = None, **change: Any) -> bytes:
    """A request in the Open Inference Protocol."""
    one = {"name": "price", "shape": [1], "datatype": "FP64", "data": [1.0], **change}
    text = json.dumps({"inputs": [one]}).encode()
    headers = {"Inference_Header_Content_Length": str(len(text) if head is None else head)}
    return http(text + tail, path, content_type="application/octet-stream", **headers)


def slowly(raw: bytes, pieces: int) -> list[bytes]:
    """Cut a request into its first half and then single bytes."""
    half = len(raw) // 2
    return [raw[:half], *(raw[half + i : half + i + 1] for i in range(pieces))]


# (what, bytes on the wire, or pieces sent slowly, status, type of the problem)
REQUESTS: list[tuple[str, bytes | list[bytes], int, str]] = [
    # Not JSON
    ("no body", http(), 422, "json_invalid"),
    ("half a body", http(GOOD[:40]), 422, "json_invalid"),
    ("two bodies in one", http(GOOD + GOOD), 422, "json_invalid"),
    ("bytes that are not UTF-8", http(b'{"candidates": [{"item_id": "\xff"}]}'), 422, "json_invalid"),
    ("an overlong slash", http(b'{"candidates": [{"item_id": "\xc0\xaf"}]}'), 422, "json_invalid"),
    ("half a surrogate pair", scored('{"item_id": "\\ud800"}'), 422, "json_invalid"),
    ("UTF-16", http(GOOD.decode().encode("utf-16")), 422, "json_invalid"),
    ("a byte order mark", http(b"\xef\xbb\xbf" + GOOD), 422, "json_invalid"),
    ("NUL bytes", http(GOOD + b"\0\0"), 422, "json_invalid"),
    ("a line break in a text", scored('{"item_id": "a\nb"}'), 422, "json_invalid"),
    ("a hexadecimal number", scored('{"price": 0x10}'), 422, "json_invalid"),
    ("a number with leading zeros", scored('{"price": 007}'), 422, "json_invalid"),
    ("a comma too many", scored('{"price": 1,}'), 422, "json_invalid"),
    ("Python's quotes", scored("{'price': 1}"), 422, "json_invalid"),
    ("a comment", http(b"/* */" + GOOD), 422, "json_invalid"),
    ("a pickle", http(b"\x80\x04\x95\x10\x00\x00\x00cos\nsystem\n"), 422, "json_invalid"),
    # Depth
    ("50,000 brackets", http(b"[" * 50_000), 422, "json_invalid"),
    ("50,000 brackets in a column", scored('{"item_id": ' + "[" * 50_000 + "]" * 50_000 + "}"), 422, "json_invalid"),
    ("50,000 objects in a column", scored('{"a":' * 50_000 + "1" + "}" * 50_000), 422, "json_invalid"),
    ("400 lists in a column", scored('{"tags": ' + "[" * 400 + "]" * 400 + "}"), 422, "value_error"),
    ("100 lists in a column", scored('{"tags": ' + "[" * 100 + "]" * 100 + "}"), 422, "value_error"),
    ("100 objects in a column", scored('{"item_id": ' + '{"a":' * 100 + "1" + "}" * 101), 422, "value_error"),
    # Numbers
    ("a number beyond floats", scored('{"price": 1e999}'), 422, "finite_number"),
    ("NaN", scored('{"price": NaN}'), 422, "finite_number"),
    ("minus infinity in a list", scored('{"tags": [-Infinity]}'), 422, "finite_number"),
    ("5,000 digits", scored('{"price": ' + "9" * 5000 + "}"), 422, "json_invalid"),
    ("400 digits", scored('{"price": ' + "9" * 400 + "}"), 422, "value_error"),
    ("an id beyond 64 bits", http(b'{"user": {"user_id": 18446744073709551616}, "candidates": [{}]}'), 422, "value_error"),
    ("a fraction for an id", http(b'{"user": {"user_id": 1.5}, "candidates": [{}]}'), 422, "value_error"),
    ("an exponent of 300,000 digits", scored('{"price": 1e' + "9" * 300_000 + "}"), 422, "finite_number"),
    # Types
    ("a list for a body", http(b"[]"), 422, "object_type"),
    ("a number for a body", http(b"7"), 422, "object_type"),
    ("null for a body", http(b"null"), 422, "object_type"),
    ("candidates as an object", http(b'{"candidates": {}}'), 422, "list_type"),
    ("null for a candidate", scored("null"), 422, "dict_type"),
    ("a list for a user", http(b'{"user": [], "candidates": [{}]}'), 422, "dict_type"),
    ("true for a text", scored('{"item_id": true}'), 422, "value_error"),
    ("text for a number", scored('{"price": "1 OR 1=1"}'), 422, "value_error"),
    ("an object for a value", scored('{"price": {"$gt": 0}}'), 422, "value_error"),
    ("a list for a value", scored('{"item_id": ["a"]}'), 422, "value_error"),
    ("a number for a model", http(b'{"model": 7, "candidates": [{}]}'), 422, "string_type"),
    # Names
    ("an unknown field", http(b'{"candidates": [{}], "debug": true}'), 422, "extra_forbidden"),
    ("an unknown column", scored('{"__class__": {"__init__": 1}}'), 422, "value_error"),
    ("a column's name of 300,000 characters", scored('{"' + "x" * 300_000 + '": 1}'), 422, "value_error"),
    ("a field's name of 300,000 characters", http(b'{"candidates": [{}], "' + b"x" * 300_000 + b'": 1}'), 422, "extra_forbidden"),
    ("30,000 columns", scored("{" + ",".join(f'"{i}":1' for i in range(30_000)) + "}"), 422, "value_error"),
    ("a model that is a path", http(b'{"model": "../../etc/passwd", "candidates": [{}]}'), 404, "unknown_model"),
    ("a model's name of 300,000 characters", http(b'{"model": "' + b"x" * 300_000 + b'", "candidates": [{}]}'), 404, "unknown_model"),
    ("a request id that breaks lines", http(b'{"request_id": "a\\r\\nSet-Cookie: b", "candidates": [{}]}'), 422, "string_pattern_mismatch"),
    ("a request id of 129 characters", http(b'{"request_id": "' + b"x" * 129 + b'", "candidates": [{}]}'), 422, "string_pattern_mismatch"),
    # Sizes
    ("no candidate", http(b'{"candidates": []}'), 422, "too_short"),
    ("51 candidates", http(json.dumps({"candidates": [{}] * 51}).encode()), 422, "too_many_candidates"),
    ("100,000 candidates", http(b'{"candidates": [' + b"{}," * 100_000 + b"{}]}"), 422, "too_many_candidates"),
    ("a text of 70,000 characters", scored('{"item_id": "' + "x" * 70_000 + '"}'), 422, "value_error"),
    ("a list of 150,000 values", http(b'{"user": {"clicked": [' + b"1," * 150_000 + b'1]}, "candidates": [{}]}'), 422, "value_error"),
    ("a body one byte too large", http(b" " * (BODY_BYTES + 1)), 413, "too_large"),
    ("a length of a petabyte", http(length=10**15), 413, "too_large"),
    ("a length of a petabyte, asking first", http(length=10**15, expect="100-continue"), 413, "too_large"),
    ("chunks without end", chunked(*[b" " * 50_000] * 20), 413, "too_large"),
    ("events without end", http(b" " * (BODY_BYTES + 1), "/v1/events"), 413, "too_large"),
    ("a line of 40,000 characters", http(GOOD, "/v1/score?model=" + "x" * 40_000), 431, "head_too_large"),
    ("a header of 40,000 characters", http(GOOD, x_filler="x" * 40_000), 431, "head_too_large"),
    ("8,000 headers", http(GOOD, **{f"x{i}": "" for i in range(8000)}), 431, "head_too_large"),
    # Types of content
    ("XML", http(GOOD, content_type="text/xml"), 415, "content_type"),
    ("a form, as a page of elsewhere may send it", http(GOOD, content_type="application/x-www-form-urlencoded"), 415, "content_type"),
    ("plain text", http(GOOD, content_type="text/plain"), 415, "content_type"),
    ("JSON in UTF-7", http(GOOD, content_type="application/json; charset=utf-7"), 415, "content_type"),
    ("parts", http(GOOD, content_type="multipart/form-data; boundary=x"), 415, "content_type"),
    ("XML for an event", http(b"{}", "/v1/events", content_type="text/xml"), 415, "content_type"),
    ("a gzip bomb", http(gzip.compress(b" " * 10_000_000), content_encoding="gzip"), 415, "content_encoding"),
    ("an unknown encoding", http(GOOD, content_encoding="x"), 415, "content_encoding"),
    # From where
    ("a page of elsewhere", http(GOOD, origin="https://elsewhere.example"), 403, "cross_origin"),
    ("a page of nowhere", http(GOOD, origin="null"), 403, "cross_origin"),
    ("a page of elsewhere, in a new browser", http(GOOD, sec_fetch_site="cross-site"), 403, "cross_origin"),
    # Keys
    ("no key", http(GOOD, authorization=None), 401, "unauthorized"),
    ("a wrong key", http(GOOD, key=TOKEN[:-4] + "AAAA"), 401, "unauthorized"),
    ("a key of 20,000 characters", http(GOOD, key="sluice_" + "0" * 20_000), 401, "unauthorized"),
    ("a key as a password", http(GOOD, authorization=f"Basic {TOKEN}"), 401, "unauthorized"),
    ("a key in the address", http(GOOD, f"/v1/score?key={TOKEN}", authorization=None), 401, "unauthorized"),
    ("a key for something else", http(GOOD, key=LIMITED), 403, "forbidden"),
    ("no key, for what does not exist", http(GOOD, "/v1/admin", authorization=None), 401, "unauthorized"),
    # Deadlines
    ("a deadline that is none", http(GOOD, x_deadline_ms="soon"), 422, "deadline"),
    ("a deadline in the past", http(GOOD, x_deadline_ms="-1"), 422, "deadline"),
    ("a deadline that is no number", http(GOOD, x_deadline_ms="nan"), 422, "deadline"),
    # Slowness
    ("a head that does not end", slowly(http(GOOD)[:60], 30), 408, "too_slow"),
    ("nothing but line breaks", [b"\r\n"] * 30, 408, "too_slow"),
    ("a body that does not come", http(length=100), 408, "too_slow"),
    ("a body that comes in drops", [http(GOOD)[:-40], *[b" "] * 30], 408, "too_slow"),
    # Not HTTP, or not quite
    ("a TLS greeting", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400, "http_invalid"),
    ("HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, "http_invalid"),
    ("HTTP/9.9", http(GOOD).replace(b"HTTP/1.1", b"HTTP/9.9"), 400, "http_invalid"),
    ("a method of its own", http(GOOD, method="HACK"), 400, "http_invalid"),
    ("a tunnel", http(GOOD, "localhost:22", method="CONNECT"), 400, "http_invalid"),
    ("a negative length", http(GOOD, length=-1), 400, "http_invalid"),
    ("a length of 31 digits", http(GOOD, length=10**30), 400, "http_invalid"),
    ("two lengths", http(GOOD, **{"Content_Length": "7"}), 400, "http_invalid"),
    ("a length and chunks", http(GOOD, transfer_encoding="chunked"), 400, "http_invalid"),
    ("chunks that are not last", http(GOOD, content_length=None, transfer_encoding="chunked, identity"), 400, "http_invalid"),
    ("a chunk of no size", http(b"ZZ\r\n", content_length=None, transfer_encoding="chunked"), 400, "http_invalid"),
    ("a chunk of 20 hexadecimal digits", http(b"f" * 20, content_length=None, transfer_encoding="chunked"), 400, "http_invalid"),
    ("a space before a colon", http(GOOD).replace(b"host:", b"host :"), 400, "http_invalid"),
    ("NUL in a header", http(GOOD, x_filler="a\0b"), 400, "http_invalid"),
    ("a folded header", http(GOOD, x_filler="a\r\n b"), 400, "http_invalid"),
    # Addresses and methods
    ("a way out of the tree", http(path="/v1/../../etc/passwd", method="GET"), 404, ""),
    ("an encoded way out", http(path="/v1/%2e%2e/%2e%2e/etc/passwd", method="GET"), 404, ""),
    ("NUL in the path", http(GOOD, "/v1/score%00"), 404, ""),
    ("a path that is not UTF-8", http(GOOD, "/v1/%ff%fe"), 404, ""),
    ("two slashes", http(GOOD, "//v1/score"), 404, ""),
    ("an experiment's name that is a query", http(path="/v1/experiments/'%20OR%201=1--", method="GET"), 404, "unknown"),
    ("DELETE", http(method="DELETE"), 405, ""),
    ("TRACE", http(method="TRACE"), 405, ""),
    ("a socket", http(path="/v1/score", method="GET", upgrade="websocket", connection="upgrade"), 405, ""),
    # Arrow and batches
    ("Arrow that is none", http(b"\xff\xff\xff\xff" + b"\x10" * 100, content_type="application/vnd.apache.arrow.stream"), 422, "arrow_invalid"),
    ("Arrow with a length of 2 GB", http(b"\xff\xff\xff\xff\xff\xff\xff\x7f", content_type="application/vnd.apache.arrow.stream"), 422, "arrow_invalid"),
    ("Arrow without a byte", http(content_type="application/vnd.apache.arrow.stream"), 422, "arrow_invalid"),
    ("a batch of 257", http(b'{"requests": [' + b"{}," * 256 + b"{}]}", "/v1/score:batch"), 422, "too_many_requests"),
    ("a batch of 50,000 brackets", http(b'{"requests": [' + b"[" * 50_000, "/v1/score:batch"), 422, "json_invalid"),
    ("a batch that is a request", http(GOOD, "/v1/score:batch"), 422, "missing"),
    # The Open Inference Protocol
    ("tensors without JSON", http(b"\xff", "/v2/models/bundle/infer"), 400, "protocol"),
    ("a model of another name", tensor("/v2/models/..%2f..%2fetc/infer"), 404, ""),
    ("a shape of 2^31 rows", tensor(shape=[2**31 - 1]), 400, "protocol"),
    ("a shape whose product overflows", tensor(shape=[50, 2**31 - 1], name="tags", datatype="BYTES"), 400, "protocol"),
    ("a negative shape", tensor(shape=[-1]), 400, "protocol"),
    ("a type that is code", tensor(datatype="object"), 400, "protocol"),
    ("binary data that is not there", tensor(parameters={"binary_data_size": 10**12}), 400, "protocol"),
    ("binary data of less than nothing", tensor(parameters={"binary_data_size": -8}, tail=b"x" * 8), 400, "protocol"),
    ("texts longer than the body", tensor(name="item_id", datatype="BYTES", parameters={"binary_data_size": 8}, tail=b"\xff\xff\xff\x7fabcd"), 400, "protocol"),
    ("a head longer than the body", tensor(head=10**9), 400, "protocol"),
    ("a head of 5,000 digits", tensor(head="9" * 5000), 400, "protocol"),
]  # fmt: skip


def send(port: int, raw: bytes | list[bytes], *, address: str = "127.0.0.1") -> tuple[int, dict[str, str], bytes]:
    """Send bytes and return status, headers and body of the answer."""
    method = "GET" if not isinstance(raw, bytes) else raw.split(b" ", 1)[0].decode("latin-1")
    with socket.create_connection(("127.0.0.1", port), 20, source_address=(address, 0)) as connection:
        pieces = [raw] if isinstance(raw, bytes) else raw
        with suppress(OSError):  # turned away before all was sent
            for i, piece in enumerate(pieces):
                connection.sendall(piece)
                if i:
                    time.sleep(0.1)
        answer = HTTPResponse(connection, method=method)
        answer.begin()
        return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()


def problems(body: bytes) -> list[dict[str, Any]]:
    tree = json.loads(body)
    return tree["detail"] if isinstance(tree.get("detail"), list) else [{"type": ""}]


@pytest.mark.parametrize(("raw", "status", "kind"), [r[1:] for r in REQUESTS], ids=[r[0] for r in REQUESTS])
def test_a_hostile_request_is_refused_for_what_it_is(
    port: int, raw: bytes | list[bytes], status: int, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("ERROR")
    told = send(port, raw)
    assert (told[0], problems(told[2])[0]["type"]) == (status, kind)
    assert len(told[2]) < 5000
    assert b"Traceback" not in told[2] and b".py" not in told[2]
    assert not [record for record in caplog.records if record.exc_info]
    assert send(port, http(GOOD))[0] == 200


def test_there_are_enough_of_them() -> None:
    assert len(REQUESTS) >= 100
    assert len({row[0] for row in REQUESTS}) == len(REQUESTS)


@pytest.mark.parametrize(
    ("raw", "same_as"),
    [
        (scored('{"price": 1, "price": 9.5}'), scored('{"price": 9.5}')),
        (http(b'{"candidates": [{"price": 1}], "candidates": [{"price": 9.5}]}'), scored('{"price": 9.5}')),
        (
            http(b'{"candidates": [{"price": 9.5, "tags": [NaN], "tags": []}]}'),
            scored('{"price": 9.5, "tags": []}'),
        ),
    ],
    ids=["a column", "a field", "a column, read slowly"],
)
def test_of_a_key_that_is_given_twice_the_last_counts(port: int, raw: bytes, same_as: bytes) -> None:
    first, second = send(port, raw), send(port, same_as)
    assert first[0] == second[0] == 200
    assert json.loads(first[2])["scores"] == json.loads(second[2])["scores"]


def test_scores_are_numbers_whatever_the_numbers_given(port: int) -> None:
    for price in ("1e308", "-1e308", "5e-324", "-0.0", "9007199254740993", "1" * 300):
        status, _, body = send(port, scored('{"price": ' + price + "}"))
        assert status == 200
        assert 0 <= json.loads(body)["scores"][0] <= 1


def test_wrong_keys_are_slowed_down_and_right_ones_are_not(port: int) -> None:
    answers = [send(port, http(GOOD, key=new_key({"score"})[0]), address="127.0.0.2") for _ in range(30)]
    statuses = [status for status, _, _ in answers]
    assert statuses[:20] == [401] * 20
    assert statuses.count(429) >= 5
    refused = next(answer for answer in answers if answer[0] == 429)
    assert int(refused[1]["retry-after"]) >= 1
    assert problems(refused[2])[0]["type"] == "rate_limited"
    assert send(port, http(GOOD), address="127.0.0.2")[0] == 200
    assert send(port, http(GOOD, key=new_key({"score"})[0]), address="127.0.0.3")[0] == 401


def test_slow_clients_keep_nobody_else_out_and_are_gone_in_the_end(port: int) -> None:
    raw = http(GOOD)
    slow = [socket.create_connection(("127.0.0.1", port), 10) for _ in range(40)]
    for connection in slow:
        connection.sendall(raw[:-10])
    assert send(port, raw)[0] == 200
    for connection in slow:
        answer = HTTPResponse(connection)
        answer.begin()
        assert answer.status == 408
        answer.read()
        assert connection.recv(1) == b""
        connection.close()


def test_requests_in_a_row_are_answered_in_order(port: int) -> None:
    asked = [http(b'{"request_id": "%d", "candidates": [{}]}' % i) for i in range(5)]
    with socket.create_connection(("127.0.0.1", port), 10) as connection:
        connection.sendall(b"".join(asked))
        for i in range(5):
            answer = HTTPResponse(connection)
            answer.begin()
            assert (answer.status, answer.getheader("x-request-id")) == (200, str(i))
            answer.read()


def test_an_answered_request_whose_body_never_ends_is_cut_off(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), 10) as connection:
        connection.sendall(http(length=10**6, path="/nowhere"))
        answer = HTTPResponse(connection)
        answer.begin()
        assert answer.status == 404
        answer.read()
        begin = time.monotonic()
        with pytest.raises(OSError):
            while time.monotonic() - begin < 15:
                connection.sendall(b"x")
                time.sleep(0.05)


def test_connections_beyond_the_limit_are_closed_at_once(listening, port: int, tmp_path: Path) -> None:
    example_bundle(tmp_path / "bundle")
    with listening(create_app(Settings(model=(str(tmp_path / "bundle"),))), seconds=30.0, most=5) as other:
        kept = [socket.create_connection(("127.0.0.1", other), 10) for _ in range(5)]
        beyond = socket.create_connection(("127.0.0.1", other), 10)
        with suppress(ConnectionResetError):
            assert beyond.recv(1) == b""
        for connection in (*kept, beyond):
            connection.close()
        until(lambda: send(other, http(GOOD))[0] == 200, seconds=10)


def test_memory_is_bounded(port: int) -> None:
    largest = sorted((raw for _, raw, *_ in REQUESTS if isinstance(raw, bytes)), key=len)[-12:]
    process = psutil.Process()

    def rounds(count: int) -> int:
        for _ in range(count):
            for raw in largest:
                send(port, raw)
        return process.memory_info().rss

    before = rounds(2)
    assert rounds(6) - before < 20 * 2**20
