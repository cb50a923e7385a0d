"""Several worker processes on one port: replaced when killed, drained together, with one set of metrics."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import psutil
import pytest
import sqlalchemy as sa

from pipelines.release.bundle import Bundle
from pipelines.release.example import example_bundle
from serving.client import free_port, stop
from serving.database import Database, exposures
from serving.security import KeyFile, new_key

BODY = {"user": {"user_id": 3}, "candidates": [{"item_id": "item-1"}]}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return example_bundle(tmp_path_factory.mktemp("made") / "bundle")


def until(done: Callable[[], object], seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.2)


class Running:
    """A server process and what it says."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self.process, self.port, self.log = process, port, log
        self.url = f"http://127.0.0.1:{port}"
        self.headers: dict[str, str] = {}

    def get(self, path: str) -> httpx.Response | None:
        try:
            return httpx.get(self.url + path, headers=self.headers, trust_env=False, timeout=5)
        except httpx.TransportError:
            return None

    def score(self) -> int:
        url = self.url + "/v1/score"
        return httpx.post(url, json=BODY, headers=self.headers, trust_env=False, timeout=20).status_code

    def up(self) -> int:
        reply = self.get("/metrics")
        return 0 if reply is None else len(re.findall(r"^sluice_worker_up\{.*\} 1$", reply.text, re.M))

    def workers(self) -> list[int]:
        return [child.pid for child in psutil.Process(self.process.pid).children()]


@contextmanager
def served(bundle: Bundle, folder: Path, *words: str, **settings: str) -> Iterator[Running]:
    port, log = free_port(), folder / "log"
    command = [sys.executable, "-m", "pipelines.cli", "serve", "-m", str(bundle.directory), "--port", str(port)]
    with open(log, "wb") as output:
        environment = {**os.environ, "SLUICE_EVENTS_SPOOL": str(folder / "spool"), "SLUICE_DRAIN_SECONDS": "1"}
        environment |= settings
        process = subprocess.Popen([*command, *words], stdout=output, stderr=output, env=environment)
    try:
        yield Running(process, port, log)
    finally:
        stop(process)


def test_workers_share_the_port_are_replaced_and_drain_together(bundle: Bundle, tmp_path: Path) -> None:
    database = f"sqlite:///{tmp_path}/events.db"
    with served(bundle, tmp_path, "--workers", "2", "--events", database) as server:
        until(lambda: server.process.poll() is not None or server.up() == 2)
        assert server.process.poll() is None, server.log.read_text()

        # Both are asked, whichever answers; a request is counted by one of them.
        acknowledged = sum(server.score() == 200 for _ in range(10))
        assert acknowledged == 10
        reply = server.get("/metrics")
        assert reply is not None
        counts = re.findall(
            r'^sluice_requests_total\{worker="\d",route="/v1/score",status="200"\} (\S+)$', reply.text, re.M
        )
        assert sum(map(float, counts)) == 10
        assert reply.text.count("# TYPE sluice_requests_total") == 1

        # One is killed: the other goes on, and it is replaced without an answer "not ready".
        victim = server.workers()[1]
        statuses: list[int] = []
        asking = threading.Event()

        def ask() -> None:
            while not asking.is_set():
                try:
                    statuses.append(server.score())
                except httpx.TransportError:
                    statuses.append(0)  # what was in its hands went down with it

        thread = threading.Thread(target=ask)
        thread.start()
        os.kill(victim, signal.SIGKILL)
        until(lambda: len(server.workers()) == 2 and victim not in server.workers())
        until(lambda: server.up() == 2)
        asking.set()
        thread.join()
        assert set(statuses) <= {200, 0}
        assert statuses.count(0) <= 1
        assert len(statuses) > 5

        # All drain: connections that are open get an answer, then everything ends.
        with httpx.Client(base_url=server.url, trust_env=False) as open_before:
            assert open_before.get("/healthz").status_code == 200
            workers = server.workers()
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.4)
            late = open_before.post("/v1/score", json=BODY)
            assert (late.status_code, late.headers["connection"]) == (503, "close")
            told = server.get("/readyz")
            assert told is not None
            assert (told.status_code, told.json()["status"]) == (503, "draining")
        assert server.process.wait(30) == 0
        assert not any(psutil.pid_exists(pid) for pid in workers)
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", server.port)) != 0
        lines = server.log.read_text().splitlines()
        assert not [line for line in lines if "Traceback" in line]
        assert any(
            '"message":"worker 1 ended; another takes its place"' in line and '"code":-9' in line for line in lines
        )
    found = Database(database).rows(sa.select(sa.func.count()).select_from(exposures))[0][0]
    # A killed worker may have written an exposure whose answer did not get out.
    assert acknowledged + statuses.count(200) <= found <= acknowledged + len(statuses)


def test_a_bundle_that_can_not_be_served_ends_the_server_with_the_reason(tmp_path: Path) -> None:
    made = example_bundle(tmp_path / "bundle")
    (made.directory / "weights.safetensors").write_bytes(b"")
    with served(made, tmp_path, "--workers", "2") as server:
        assert server.process.wait(90) == 2
        told = server.log.read_text()
    assert told.splitlines()[-1].startswith("error: ")
    assert "weights.safetensors: SHA-256 expected" in told.splitlines()[-1]
    assert "Traceback" not in told


def test_workers_end_with_a_supervisor_that_is_killed(bundle: Bundle, tmp_path: Path) -> None:
    with served(bundle, tmp_path, "--workers", "2") as server:
        until(lambda: server.process.poll() is not None or server.up() == 2)
        workers = server.workers()
        assert len(workers) == 2
        server.process.kill()
        server.process.wait()
        until(lambda: not any(psutil.pid_exists(pid) for pid in workers), 30)


def test_a_worker_that_hangs_is_killed_and_replaced_and_one_that_is_busy_is_not(
    bundle: Bundle, tmp_path: Path
) -> None:
    candidates = [{"item_id": f"item-{i % 20}", "price": float(i)} for i in range(1000)]
    large = {"requests": [{"user": {"user_id": i}, "candidates": candidates} for i in range(4)]}
    asking = threading.Event()

    def ask() -> None:
        while not asking.is_set():
            with suppress(httpx.TransportError):  # what was in the hands of the one that hangs
                httpx.post(server.url + "/v1/score:batch", json=large, trust_env=False, timeout=5)

    with served(bundle, tmp_path, "--workers", "2", SLUICE_HUNG_SECONDS="5") as server:
        until(lambda: server.process.poll() is not None or server.up() == 2)
        busy, victim = server.workers()
        thread = threading.Thread(target=ask)
        thread.start()
        try:
            os.kill(victim, signal.SIGSTOP)
            time.sleep(2)
            os.kill(victim, signal.SIGCONT)  # it was away, but not for long
            until(lambda: server.up() == 2)
            assert server.workers() == [busy, victim]
            os.kill(victim, signal.SIGSTOP)
            until(lambda: victim not in server.workers() and len(server.workers()) == 2)
        finally:
            asking.set()
            thread.join()
        until(lambda: server.up() == 2)
        assert busy in server.workers()
        assert server.score() == 200
        lines = server.log.read_text().splitlines()
    assert sum('"message":"worker 1 hangs and is killed"' in line for line in lines) == 1
    assert not any('"message":"worker 0' in line and "ready" not in line for line in lines)


def test_a_rate_is_of_all_workers_together_and_the_end_of_a_terminal_drains_them(
    bundle: Bundle, tmp_path: Path, process_as_it_was: None
) -> None:
    token, key = new_key({"score", "admin"}, rate=0.01, burst=12)
    watcher, other = new_key({"admin"})
    KeyFile(keys=(key, other)).write(tmp_path / "keys.json")
    keys = str(tmp_path / "keys.json")
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the server inherits it; one under nohup would go on
    with served(bundle, tmp_path, "--workers", "2", "--keys", keys, "--events", "none") as server:
        server.headers = {"X-API-Key": watcher}
        until(lambda: server.process.poll() is not None or server.up() == 2)
        assert server.process.poll() is None, server.log.read_text()
        server.headers = {"X-API-Key": token}
        statuses = [server.score() for _ in range(40)]  # a connection each
        assert (statuses.count(200), statuses.count(429)) == (12, 28)
        # A worker that is replaced finds what was counted.
        victim = server.workers()[1]
        os.kill(victim, signal.SIGKILL)
        server.headers = {"X-API-Key": watcher}
        until(lambda: victim not in server.workers() and server.up() == 2)
        server.headers = {"X-API-Key": token}
        assert {server.score() for _ in range(10)} == {429}
        server.process.send_signal(signal.SIGHUP)
        assert server.process.wait(30) == 0
    assert "draining" in server.log.read_text()


def test_a_server_that_is_stopped_while_it_loads_ends_well_and_soon(bundle: Bundle, tmp_path: Path) -> None:
    with served(bundle, tmp_path, "--workers", "2") as server:
        until(lambda: server.process.poll() is not None or server.workers())
        (loading,) = server.workers()
        os.kill(loading, signal.SIGSTOP)  # however long it takes
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(10) == 0
        assert not psutil.pid_exists(loading)
    assert "Traceback" not in server.log.read_text()
