"""Nothing is computed, and nothing said to have been served, for clients that did not wait."""

from __future__ import annotations

import json
import logging
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import httpx
import numpy as np
import pytest
import sqlalchemy as sa

from pipelines.release.example import example_bundle
from serving.app import create_app
from serving.batching import Encoded
from serving.database import Database, exposures
from serving.forward import Forward
from serving.settings import Settings
from tests.serving.waiting import until


class Held:
    """A server whose passes wait, and the numbers of candidates of the requests that were computed."""

    def __init__(self, port: int, folder: Path) -> None:
        self.port, self.folder = port, folder
        self.gate, self.begun = threading.Event(), list[int]()

    def asked(self, rows: int, path: str = "/v1/score") -> bytes:
        """Return a request as bytes, named by the number of its candidates."""
        one = {"user": {"user_id": 3}, "candidates": [{"item_id": "item-1"}] * rows, "request_id": f"r{rows}"}
        body = json.dumps(one if path == "/v1/score" else {"requests": [one]}).encode()
        return f"POST {path} HTTP/1.1\r\nhost: here\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body

    def send(self, *requests: bytes) -> socket.socket:
        """Send requests by a connection of their own, and return it."""
        client = socket.create_connection(("127.0.0.1", self.port), timeout=20)
        client.sendall(b"".join(requests))
        return client

    def told(self, line: str) -> bool:
        """Whether the metrics hold a line."""
        return line in httpx.get(f"http://127.0.0.1:{self.port}/metrics", trust_env=False).text

    def leave(self, client: socket.socket) -> None:
        """Close a connection, and wait until the server has seen it: it answers what came later."""
        client.close()
        self.told("")
        self.told("")

    def left(self) -> list[str]:
        """Return the requests that left an exposure."""
        database = Database(f"sqlite:///{self.folder}/events.db")
        rows = database.rows(sa.select(exposures.c.request_id).order_by(exposures.c.time))
        database.close()
        return [row[0] for row in rows]


@pytest.fixture
def held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listening: Callable[..., AbstractContextManager[int]]
) -> Iterator[Held]:
    example_bundle(tmp_path / "bundle", model="dnn")
    settings = Settings(
        model=(str(tmp_path / "bundle"),),
        inline_ms=0,
        events_url=f"sqlite:///{tmp_path}/events.db",
        events_spool=tmp_path / "spool",
    )
    with listening(create_app(settings)) as port:
        held, forward = Held(port, tmp_path), Forward.__call__

        def slow(self: Forward, requests: Sequence[Encoded]) -> np.ndarray:
            held.begun.extend(map(len, requests))
            assert held.gate.wait(20)
            return forward(self, requests)

        monkeypatch.setattr(Forward, "__call__", slow)
        yield held
        held.gate.set()


@pytest.mark.parametrize("path", ["/v1/score", "/v1/score:batch"])
def test_who_does_not_wait_is_not_computed(held: Held, path: str, served: list[bool]) -> None:
    first = held.send(held.asked(1))
    until(lambda: held.begun == [1])
    second, third = held.send(held.asked(2, path)), held.send(held.asked(3, path))
    until(lambda: held.told("sluice_queue_rows 5.0"))
    held.leave(second)
    held.gate.set()
    assert first.recv(100).startswith(b"HTTP/1.1 200") and third.recv(100).startswith(b"HTTP/1.1 200")
    assert held.begun == [1, 3]
    assert sorted(served) == [False, True, True]
    assert held.left() == ["r1", "r3"]
    assert held.told('sluice_errors_total{reason="gone"} 1.0')
    assert held.told(f'sluice_requests_total{{route="{path}",status="499"}} 1.0')
    first.close()
    third.close()


def test_who_went_during_his_pass_leaves_no_exposure(held: Held) -> None:
    client = held.send(held.asked(2))
    until(lambda: held.begun == [2])
    held.leave(client)
    held.gate.set()
    until(lambda: held.told('sluice_errors_total{reason="gone"} 1.0'))
    with held.send(held.asked(3)) as other:
        assert other.recv(100).startswith(b"HTTP/1.1 200")
    assert (held.begun, held.left()) == ([2, 3], ["r3"])


def test_requests_behind_one_another_are_all_lost_and_nothing_is_logged_of_it(
    held: Held, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        client = held.send(held.asked(2), held.asked(3))
        until(lambda: held.begun == [2])
        held.leave(client)
        held.gate.set()
        until(lambda: held.told('sluice_errors_total{reason="gone"} 1.0'))
    assert (held.begun, held.left(), caplog.records) == ([2], [], [])
