"""Databases of events, the embedded one and a real server; applications over real connections."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import uvicorn

from serving.connections import protocol


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


@contextmanager
def _listening(app: Any, **limits: Any) -> Iterator[int]:
    """Serve an application as ``sluice serve`` does, on a thread; yield its port once it is ready."""
    options = {"http": protocol(**{"seconds": 30.0, "most": 100, **limits})}
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=1, **options))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    port = listener.getsockname()[1]
    try:
        end = time.monotonic() + 60
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
            while not server.started or client.get("/readyz").status_code != 200:
                assert time.monotonic() < end
                time.sleep(0.02)
        yield port
    finally:
        server.should_exit = True
        thread.join(30)


@pytest.fixture(scope="session")
def listening() -> Callable[..., AbstractContextManager[int]]:
    """A function that serves an application over real connections."""
    return _listening
