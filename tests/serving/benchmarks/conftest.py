"""A server that does what bodies say."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest


class Handler(BaseHTTPRequestHandler):
    """Answers after 10 ms, ``no`` by 503; ends the connection once it answered ``bye``, and at ``gone`` at once.

    At ``idle`` too, unless it is the connection's first.
    """

    protocol_version = "HTTP/1.1"
    answered = False

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        time.sleep(0.01)
        if body == b"gone" or (body == b"idle" and self.answered):
            self.close_connection = True
            return
        self.answered = True
        answer = b"x" * 100_000  # comes in several pieces
        self.send_response(503 if body == b"no" else 200)
        self.send_header("Content-Length", str(len(answer)))
        if body == b"bye":
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def port() -> Iterator[int]:
    """Of a server that runs for a test."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()
