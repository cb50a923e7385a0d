"""A server as a child process, and a client for it: what the demo and the system tests stand on."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ctr_models.errors import ArtifactError

if TYPE_CHECKING:
    import httpx


def free_port(host: str = "127.0.0.1") -> int:
    """Return a port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


@contextmanager
def running_server(
    model: str,
    *,
    tracking_uri: str | None = None,
    log: Path,
    timeout: float = 90.0,
    options: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> Iterator[httpx.Client]:
    """Run ``sluice serve`` on a free loopback port for as long as the block lasts; nothing is left running.

    Not even when this process is killed: the server then ends by itself.

    Args:
        model: URI or path of a bundle.
        tracking_uri: of the MLflow store.
        log: file that gets the server's output.
        timeout: seconds until it must be ready.
        options: more words of the command line.
        environment: more settings, as variables.

    Yields:
        A client with the server's address as its base.

    Raises:
        ArtifactError: the server ended, or was not ready in time; with its last line.
    """
    import httpx

    port = free_port()
    command = [sys.executable, "-m", "pipelines.cli", "serve", "-m", model, "--port", str(port), *options]
    command += ["--parent", str(os.getpid())]
    if tracking_uri is not None:
        command += ["--tracking-uri", tracking_uri]
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **(environment or {})}
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30.0, trust_env=False) as client:
            _wait(process, client, log, timeout)
            yield client
    finally:
        stop(process)


def stop(process: subprocess.Popen[bytes], grace: float = 15.0) -> int:
    """Ask a process to end, wait, and end it by force if it does not; return its exit code."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        return process.wait(grace)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def _wait(process: subprocess.Popen[bytes], client: httpx.Client, log: Path, timeout: float) -> None:
    import httpx

    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if process.poll() is not None:
            break
        try:
            if client.get("/readyz").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    what = (
        f"ended with code {process.poll()}" if process.poll() is not None else f"was not ready in {timeout:.0f} s"
    )
    raise ArtifactError(f"the server {what}: {lines[-1] if lines else 'no output'}", where=str(log))
