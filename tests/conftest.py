"""What every test may use."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# Tests run side by side: one thread each, set before torch is imported, and inherited by processes they start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# Without a GPU, Triton's kernels run in its interpreter; it has to know before it is imported.
if not Path("/dev/nvidia0").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A shared machine is slow at times; that is no failure of a property.
settings.register_profile("sluice", parent=settings.default, deadline=None)
settings.load_profile("sluice")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Where real data and Airflow are, tests that need them are skipped without; and how long to look for bugs."""
    parser.addoption(
        "--data", type=Path, help="folder with movielens_100k, movielens_1m, frappe …; for tests marked data"
    )
    parser.addoption(
        "--airflow", type=Path, help="virtual environment that holds Airflow; for tests marked airflow"
    )
    parser.addoption(
        "--fuzz-examples", type=int, default=150, help="mutated Arrow streams that the server must survive [150]"
    )
    parser.addoption("--schemathesis-cases", type=int, default=60, help="cases made of the OpenAPI document [60]")


@pytest.fixture(scope="session")
def data_root(request: pytest.FixtureRequest) -> Path:
    """The folder of ``--data``."""
    return _given(request, "--data", "real data: give the folder that holds them")


@pytest.fixture(scope="session")
def airflow_venv(request: pytest.FixtureRequest) -> Path:
    """The environment of ``--airflow``."""
    return _given(request, "--airflow", "Airflow in an environment of its own: run make airflow-test")


def _given(request: pytest.FixtureRequest, option: str, need: str) -> Path:
    path: Path | None = request.config.getoption(option)
    if path is None:
        pytest.skip(f"needs {need} ({option} FOLDER)")
    if not path.is_dir():
        raise pytest.UsageError(f"{option} {path}: no such folder")
    return path.resolve()


class RedisServer:
    """A Redis of one test, on a port of its own; what it acknowledged outlives a kill."""

    def __init__(self, program: str, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        settings = {"port": self.port, "bind": "127.0.0.1", "dir": folder, "save": "", "appendonly": "yes"}
        self._command = [program, *(text for name, value in settings.items() for text in (f"--{name}", str(value)))]
        self._command += ["--appendfsync", "always"]
        self._process: subprocess.Popen[bytes] | None = None
        self.url = f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        """Start it, and wait until it answers."""
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
        end = time.monotonic() + 30
        while True:
            try:
                with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
                    connection.sendall(b"PING\r\n")
                    if connection.recv(100).startswith(b"+PONG"):
                        return
            except OSError:
                pass
            assert time.monotonic() < end and self._process.poll() is None, "redis-server does not start"
            time.sleep(0.02)

    def kill(self) -> None:
        """End it as a power cut would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def pause(self) -> None:
        """Let it hang: connections stay, nothing answers."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)


@pytest.fixture
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A real Redis, empty."""
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("needs redis-server (Debian's package redis-server)")
    server = RedisServer(program, tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.kill()
