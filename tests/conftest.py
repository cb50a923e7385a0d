"""What every test may use."""

from __future__ import annotations

import logging
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from hypothesis import settings

# Tests run side by side: one thread each, set before torch is imported, and inherited by processes they start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# A server that a test starts keeps events only where the test says so, and never beside the sources.
os.environ["SLUICE_EVENTS_URL"] = "none"
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
    parser.addoption(
        "--rounds", type=int, help="how often tests/system kills, swaps and restarts; a few times without it"
    )


@pytest.fixture
def any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let operators take their faster ways for the small examples of tests too."""
    from kernels import OPERATORS

    for operator in OPERATORS.values():
        every = tuple(replace(one, worth=lambda *_: True) for one in operator.implementations)
        monkeypatch.setattr(operator, "implementations", every)


@pytest.fixture
def process_as_it_was() -> Iterator[None]:
    """Take back what a server changes of the process that it is started in: logging, and the end of a terminal."""
    loggers = [logging.getLogger(name) for name in ("sluice", "uvicorn")]
    kept = [(one.handlers, one.propagate, one.level) for one in loggers]
    hangup = signal.getsignal(signal.SIGHUP)
    yield
    signal.signal(signal.SIGHUP, hangup)
    for one, (handlers, propagate, level) in zip(loggers, kept, strict=True):
        one.handlers, one.propagate = handlers, propagate
        one.setLevel(level)


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


class PostgresServer:
    """A PostgreSQL of the test run, on a port of its own."""

    def __init__(self, programs: Path) -> None:
        # It refuses to run as root, and pytest's folders are closed to others.
        self.folder = Path(tempfile.mkdtemp(prefix="sluice-postgres-"))
        self._user = self._other_user()
        if self._user is not None:
            shutil.chown(self.folder, self._user)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        data = str(self.folder / "data")
        self._run([str(programs / "initdb"), "-D", data, "-U", "sluice", "-A", "trust", "-E", "UTF8", "--no-sync"])
        settings = {"port": self.port, "listen_addresses": "127.0.0.1", "unix_socket_directories": ""}
        self._command = [str(programs / "postgres"), "-D", data]
        self._command += [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        self._process: subprocess.Popen[bytes] | None = None
        self._made = 0

    def start(self) -> None:
        """Start it, and wait until it answers."""
        import psycopg

        with open(self.folder / "log", "ab") as log:
            self._process = subprocess.Popen(
                self._command, stdout=log, stderr=log, user=self._user, cwd=self.folder
            )
        end = time.monotonic() + 60
        while True:
            try:
                psycopg.connect(self.url("postgres"), connect_timeout=2).close()
                return
            except psycopg.OperationalError:
                assert time.monotonic() < end and self._process.poll() is None, (self.folder / "log").read_text()
                time.sleep(0.05)

    def kill(self) -> None:
        """End it and all its processes as a power cut would: its next start recovers from the log."""
        if self._process is not None:
            all_of_it = psutil.Process(self._process.pid).children(recursive=True)
            self._process.kill()
            for process in all_of_it:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            self._process.wait()
            for process in all_of_it:
                with suppress(psutil.NoSuchProcess):
                    while process.status() != psutil.STATUS_ZOMBIE:  # nobody may be there to bury it
                        time.sleep(0.01)
            self._process = None

    def pause(self) -> None:
        """Let it hang: connections stay, nothing answers."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        assert self._process is not None
        for process in (main := psutil.Process(self._process.pid), *main.children(recursive=True)):
            process.send_signal(number)

    def url(self, database: str) -> str:
        """The address of a database."""
        return f"postgresql://sluice@127.0.0.1:{self.port}/{database}"

    def new_database(self) -> str:
        """Make an empty database; return its address."""
        import psycopg

        self._made += 1
        name = f"events{self._made}"
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}".encode())
        return self.url(name)

    def _run(self, command: list[str]) -> None:
        subprocess.run(command, check=True, capture_output=True, user=self._user, cwd=self.folder)

    @staticmethod
    def _other_user() -> str | None:
        if os.geteuid() != 0:
            return None
        known = {entry.pw_name for entry in pwd.getpwall()}
        return "postgres" if "postgres" in known else "nobody"


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A real PostgreSQL."""
    pytest.importorskip("psycopg", reason="needs the extra sluice[postgres]")
    places = [shutil.which("initdb"), *sorted(map(str, Path("/usr/lib/postgresql").glob("*/bin/initdb")))]
    found = [Path(place).resolve().parent for place in places if place]
    if not found:
        pytest.skip("needs PostgreSQL (Debian's package postgresql)")
    server = PostgresServer(found[-1])
    try:
        server.start()
        yield server
    finally:
        server.kill()
        shutil.rmtree(server.folder, ignore_errors=True)


@pytest.fixture(params=["sqlite", "postgresql"])
def events_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The address of an empty database: the same tests run over both kinds."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/events.db"
    return str(request.getfixturevalue("postgres").new_database())
