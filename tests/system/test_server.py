"""A real server process: started, scored over the wire, stopped, killed."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import sqlalchemy as sa

from ctr_models.errors import ArtifactError
from pipelines.release.bundle import SCORE, Bundle
from pipelines.release.example import example_bundle
from pipelines.release.promotion import promote
from pipelines.release.registry import register
from pipelines.release.store import default_uri
from serving.client import free_port, running_server, stop
from serving.database import Database, exposures

SERVE = [sys.executable, "-m", "pipelines.cli", "serve"]
BODY = {"user": {"user_id": 3}, "candidates": [{"item_id": "item-1"}]}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return example_bundle(tmp_path_factory.mktemp("made") / "bundle")


def start(bundle: Path, port: int, log: Path) -> subprocess.Popen[bytes]:
    with open(log, "wb") as output:
        return subprocess.Popen([*SERVE, "-m", str(bundle), "--port", str(port)], stdout=output, stderr=output)


def wait_until(port: int, path: str, status: int = 200) -> None:
    end = time.monotonic() + 90
    while time.monotonic() < end:
        try:
            if httpx.get(f"http://127.0.0.1:{port}{path}", trust_env=False).status_code == status:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise AssertionError(f"{path} never answered {status}")


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_a_registered_champion_is_served(bundle: Bundle, tmp_path: Path) -> None:
    uri = default_uri(tmp_path)
    promote("clicks", register(bundle.directory, "clicks", uri), tracking_uri=uri)
    with running_server("models:/clicks@champion", tracking_uri=uri, log=tmp_path / "log") as client:
        port = client.base_url.port
        assert port is not None
        rows = bundle.golden.drop(SCORE).to_dicts()
        reply = client.post("/v1/score", json={"candidates": rows}).json()
        np.testing.assert_allclose(reply["scores"], bundle.golden[SCORE].to_numpy(), atol=1e-5)
        assert (reply["model"]["name"], reply["model"]["version"]) == ("clicks", 1)
    assert not listens(port)
    told = (tmp_path / "log").read_text()
    assert "clicks version 1" in told
    assert "Traceback" not in told


def test_sigterm_answers_what_is_in_flight_and_exits_0(bundle: Bundle, tmp_path: Path) -> None:
    port = free_port()
    process = start(bundle.directory, port, tmp_path / "log")
    try:
        wait_until(port, "/readyz")
        rows = bundle.golden.drop(SCORE).to_dicts() * 100
        body = json.dumps({"candidates": rows}).encode()
        head = "POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(body)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", port), timeout=60) as asking:
            asking.sendall(head.encode() + body[:100])
            while (
                "sluice_requests_in_hand 2.0"
                not in httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False).text
            ):
                time.sleep(0.05)
            process.send_signal(signal.SIGTERM)
            wait_until(port, "/readyz", 503)
            asking.sendall(body[100:])
            reply = http.client.HTTPResponse(asking)
            reply.begin()
            assert reply.status == 200
            assert len(json.loads(reply.read())["scores"]) == len(rows)
        assert process.wait(30) == 0
    finally:
        stop(process)
    assert not listens(port)


def test_a_killed_server_leaves_nothing(bundle: Bundle, tmp_path: Path) -> None:
    port = free_port()
    process = start(bundle.directory, port, tmp_path / "log")
    try:
        wait_until(port, "/readyz")
        before = sorted(p.name for p in bundle.directory.rglob("*"))
        process.kill()
        process.wait(30)
    finally:
        stop(process)
    assert not listens(port)
    children = Path("/proc").glob("[0-9]*/stat")
    assert not any(_parent(path) == process.pid for path in children)
    assert sorted(p.name for p in bundle.directory.rglob("*")) == before
    again = start(bundle.directory, port, tmp_path / "log2")
    try:
        wait_until(port, "/readyz")
    finally:
        assert stop(again) == 0


OWNER = """
import time
from pathlib import Path
from serving.client import running_server
with running_server({model!r}, log=Path({log!r})) as client:
    print(client.base_url.port, flush=True)
    time.sleep(600)
"""


def test_a_server_ends_with_the_process_that_started_it_even_if_that_is_killed(
    bundle: Bundle, tmp_path: Path
) -> None:
    script = OWNER.format(model=str(bundle.directory), log=str(tmp_path / "log"))
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        port = int(owner.stdout.readline())
        assert listens(port)
        owner.kill()
    end = time.monotonic() + 30
    while listens(port):
        assert time.monotonic() < end, "the server is still there"
        time.sleep(0.1)


def _parent(stat: Path) -> int:
    try:
        return int(stat.read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError):
        return -1


def newcomer() -> dict[str, str]:
    """The environment of somebody who set nothing."""
    return {name: value for name, value in os.environ.items() if not name.startswith("SLUICE_")}


def test_exposures_are_kept_unless_told_otherwise_and_survive_a_kill(bundle: Bundle, tmp_path: Path) -> None:
    port, log = free_port(), tmp_path / "log"
    command = [*SERVE, "-m", str(bundle.directory), "--port", str(port)]
    with open(log, "wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, cwd=tmp_path, env=newcomer())
    try:
        wait_until(port, "/readyz")
        url = f"http://127.0.0.1:{port}/v1/score"
        ids = {httpx.post(url, json=BODY, trust_env=False).json()["request_id"] for _ in range(5)}
        process.kill()
        process.wait(30)
    finally:
        stop(process)
    database = tmp_path / "runs" / "events.db"
    assert f"exposures and events are kept in {database}" in log.read_text()
    found = Database(f"sqlite:///{database}").rows(sa.select(exposures.c.request_id))
    assert len(ids) == 5
    assert {row.request_id for row in found} == ids


def test_where_nothing_can_be_kept_the_server_says_so_and_what_to_do(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("no folder")
    words = "-m", str(bundle.directory), "--port", "0"
    done = subprocess.run([*SERVE, *words], capture_output=True, text=True, cwd=tmp_path, env=newcomer())
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path}/runs")
    assert "exposures and events can't be kept here (Not a directory)" in done.stderr
    assert "--events none keeps nothing" in done.stderr
    assert "Traceback" not in done.stderr


def serve(*words: str, **environment: str) -> tuple[int, str]:
    done = subprocess.run(
        [*SERVE, *words], capture_output=True, text=True, timeout=120, env={**os.environ, **environment}
    )
    return done.returncode, done.stderr


def test_a_bundle_with_one_byte_changed_ends_the_server_with_the_reason(tmp_path: Path) -> None:
    bundle = example_bundle(tmp_path / "bundle")
    weights = bundle.directory / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    code, told = serve("-m", str(bundle.directory), "--port", "0")
    assert code == 2
    assert f"{weights}: SHA-256 expected" in told
    assert "Traceback" not in told


def test_a_taken_port_is_told(bundle: Bundle) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, told = serve("-m", str(bundle.directory), "--port", str(port))
    assert code == 2
    assert f"127.0.0.1:{port}: the port is taken. give another with --port" in told


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no model to serve. give --model"),
        (["-m", "nowhere"], "nowhere: no such folder. a bundle is a folder with bundle.json"),
        (["-m", "models:/clocks@champion"], "no registered model 'clocks'"),
    ],
)
def test_a_model_that_is_not_there_is_told(words: list[str], message: str, tmp_path: Path) -> None:
    code, told = serve(*words, "--port", "0", SLUICE_TRACKING_URI=default_uri(tmp_path))
    assert code == 2
    assert message in told


def test_running_server_tells_why_it_did_not_start(tmp_path: Path) -> None:
    def enter() -> Any:
        with running_server("nowhere", log=tmp_path / "log"):
            raise AssertionError("unreachable")

    with pytest.raises(ArtifactError, match=r"the server ended with code 2: .*nowhere: no such folder"):
        enter()
