"""The load generator tells what a server did, no more and no less."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from serving.benchmarks.load import load


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        time.sleep(0.01)
        answer = b"x" * 100_000  # comes in several pieces
        self.send_response(503 if body == b"no" else 200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def port() -> Iterator[int]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def test_as_fast_as_answers_come(port: int) -> None:
    found = load(port, "/", [b"yes", b"no"], rows=5, clients=2, seconds=0.4)
    assert sum(found.others.values()) == found.others[503]
    assert abs(found.others[503] - len(found.latencies)) <= 2
    assert found.milliseconds(50) >= 10
    assert found.rows_per_second == pytest.approx(5 * len(found.latencies) / found.seconds)
    assert found.seconds >= 0.4


def test_at_a_rate(port: int) -> None:
    found = load(port, "/", [b"yes"], rows=1, clients=16, seconds=0.5, rate=40)
    assert len(found.latencies) == 20
    assert found.milliseconds(50) >= 10
