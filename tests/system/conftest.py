"""A server that may be killed, and clients that know what it acknowledged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

import httpx
import polars as pl
import pytest

from pipelines.release.bundle import Bundle
from pipelines.release.example import example_bundle
from serving.client import free_port, stop
from serving.database import Database
from serving.export import export


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle of an untrained model."""
    return example_bundle(tmp_path_factory.mktemp("made") / "bundle")


class ServerProcess:
    """``sluice serve`` on a port that stays the same from start to start."""

    def __init__(self, folder: Path, model: str, **settings: object) -> None:
        self.port, self.log = free_port(), folder / "server.log"
        self._command = [sys.executable, "-m", "pipelines.cli", "serve", "-m", model, "--port", str(self.port)]
        self._command += ["--parent", str(os.getpid())]
        own = {f"SLUICE_{name.upper()}": str(value) for name, value in settings.items()}
        self._environment = {**os.environ, **own}
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it; it is not ready yet."""
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(self._command, stdout=log, stderr=log, env=self._environment)

    def get(self, path: str) -> httpx.Response:
        """Ask once."""
        return httpx.get(f"http://127.0.0.1:{self.port}{path}", timeout=10, trust_env=False)

    def wait(
        self, path: str = "/readyz", found: Callable[[Any], bool] = lambda _: True, seconds: float = 90
    ) -> Any:
        """Wait until a path answers 200 with what is looked for; return that."""
        end = time.monotonic() + seconds
        reply = None
        while time.monotonic() < end:
            assert self.process is None or self.process.poll() is None, self.log.read_text()[-2000:]
            try:
                reply = self.get(path)
                if reply.status_code == 200 and found(reply.json()):
                    return reply.json()
            except httpx.TransportError:
                pass
            time.sleep(0.05)
        raise AssertionError(
            f"{path} did not come to it, last {reply and reply.text}; {self.log.read_text()[-2000:]}"
        )

    def kill(self) -> None:
        """End it by SIGKILL."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """End it politely; return its exit code."""
        return 0 if self.process is None else stop(self.process)


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., ServerProcess]]:
    """Make servers: model and settings in, a process out that does not outlive the test."""
    made: list[ServerProcess] = []

    def make(model: str, **settings: object) -> ServerProcess:
        made.append(ServerProcess(tmp_path, model, **settings))
        return made[-1]

    yield make
    for server in made:
        server.stop()


class Clients:
    """Threads that ask for scores and send what came of them, for as long as the block lasts.

    Each conversion is worth 1, and is sent again under the same id until it is acknowledged: the sum of an
    export then tells whether it was counted once.

    Attributes:
        scored: request id of each answer with 200, and the answer.
        converted: request ids whose conversion was acknowledged.
        others: answers by another status.
        broken: requests without an answer.
        longest: seconds of the longest wait for an answer, of any status.
    """

    def __init__(
        self, port: int, requests: Sequence[dict[str, Any]], *, threads: int = 4, events: bool = True
    ) -> None:
        self.scored: dict[str, dict[str, Any]] = {}
        self.converted: set[str] = set()
        self.others: Counter[int] = Counter()
        self.broken, self.longest = 0, 0.0
        self._port, self._events = port, events
        self._bodies = [json.dumps(request).encode() for request in requests]
        self._going = True
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(threads)]

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._going = False
        for thread in self._threads:
            thread.join()

    def go_on(self, answers: int, seconds: float = 60) -> None:
        """Wait until so many more requests have been scored."""
        before, end = len(self.scored), time.monotonic() + seconds
        while len(self.scored) < before + answers:
            assert time.monotonic() < end, f"{len(self.scored) - before} of {answers} answers; others {self.others}"
            time.sleep(0.01)

    def _run(self, number: int) -> None:
        connection = HTTPConnection("127.0.0.1", self._port, timeout=30)
        left: tuple[str, bytes] | None = None  # a conversion that was not acknowledged
        turn = number
        while self._going:
            try:
                if left is None:
                    turn += 1
                    answer = self._post(connection, "/v1/score", self._bodies[turn % len(self._bodies)])
                    if answer is None:
                        continue
                    self.scored[answer["request_id"]] = answer
                    if not self._events:
                        continue
                    event = {"event_id": uuid.uuid4().hex, "type": "conversion", "value": 1.0}
                    event |= {"request_id": answer["request_id"], "candidate": 0}
                    left = answer["request_id"], json.dumps(event).encode()
                if self._post(connection, "/v1/events", left[1]) is not None:
                    self.converted.add(left[0])
                    left = None
            except (OSError, HTTPException):
                self.broken += 1
                connection.close()
                time.sleep(0.02)
        connection.close()

    def _post(self, connection: HTTPConnection, path: str, body: bytes) -> dict[str, Any] | None:
        begin = time.perf_counter()
        connection.request("POST", path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        content = response.read()
        self.longest = max(self.longest, time.perf_counter() - begin)
        if response.status == 200:
            return dict(json.loads(content))
        self.others[response.status] += 1
        time.sleep(0.01)
        return None


@pytest.fixture
def rounds(request: pytest.FixtureRequest) -> Callable[[int], int]:
    """How often to do it: ``--rounds``, or the few times given."""
    asked = request.config.getoption("--rounds")
    return lambda few: few if asked is None else asked


@pytest.fixture
def clients() -> type[Clients]:
    """The class: ``with clients(port, requests) as load``."""
    return Clients


def _exported(url: str, folder: Path) -> pl.DataFrame:
    """Return what the export says of each request: rows, and the sum of what its conversions are worth."""
    database = Database(url)
    try:
        export(database, folder / "logs")
    finally:
        database.close()
    rows = pl.scan_parquet(folder / "logs" / "*" / "*.parquet")
    found = rows.group_by("served_request_id").agg(
        rows=pl.len(), candidates=pl.col("served_candidate").n_unique(), worth=pl.col("value").sum()
    )
    return found.rename({"served_request_id": "request"}).collect()


def _once(clients: Clients, url: str, folder: Path) -> None:
    """Assert that each acknowledged exposure and conversion is in the export exactly once."""
    found = _exported(url, folder)
    assert found["rows"].unique().to_list() == [3] and found["candidates"].unique().to_list() == [3]
    missing = set(clients.scored) - set(found["request"])
    assert not missing, f"{len(missing)} of {len(clients.scored)} acknowledged exposures are gone"
    worth = dict(found.select("request", "worth").rows())
    wrong = {request: worth[request] for request in clients.converted if worth[request] != 1.0}
    assert not wrong, f"{len(wrong)} of {len(clients.converted)} acknowledged events are not there once: {wrong}"
    assert max(worth.values()) <= 1.0


@pytest.fixture
def exported_once() -> Callable[[Clients, str, Path], None]:
    """A check: all that clients had acknowledged is in the export of a database, exactly once."""
    return _once
