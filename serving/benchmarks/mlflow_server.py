"""MLflow's server, ``mlflow models serve``: what serving a bundle is set against."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.release.bundle import Bundle

PATH = "/invocations"


def body(request: dict[str, Any]) -> bytes:
    """Return a request of ``/v1/score`` as MLflow takes it: plain rows.

    Example:
        >>> body({"user": {"u": 1}, "context": {}, "candidates": [{"i": 2}, {"i": 3, "p": 4}]})
        b'{"dataframe_split": {"columns": ["u", "i", "p"], "data": [[1, 2, null], [1, 3, 4]]}}'
    """
    rows = [{**request["user"], **request["context"], **candidate} for candidate in request["candidates"]]
    names = list(dict.fromkeys(name for row in rows for name in row))
    data = [[row.get(name) for name in names] for row in rows]
    return json.dumps({"dataframe_split": {"columns": names, "data": data}}).encode()


@contextmanager
def mlflow_server(bundle: Bundle, scratch: Path) -> Iterator[int]:
    """Run ``mlflow models serve`` of a bundle for as long as the block lasts.

    Args:
        bundle: registered in a store of its own.
        scratch: folder for the store and the server's output.

    Yields:
        Its port on 127.0.0.1.

    Raises:
        ArtifactError: the server did not start; with its last line.
    """
    import httpx

    from ctr_models.errors import ArtifactError
    from pipelines.release.registry import register
    from pipelines.release.store import default_uri
    from serving.client import free_port, stop

    uri, port = default_uri(scratch / "mlflow"), free_port()
    version = register(bundle.directory, "bench", uri)
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", f"models:/bench/{version}"]
    command += ["--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)]
    # It starts uvicorn by name: that of this environment, activated or not.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = {**os.environ, "PATH": path, "MLFLOW_TRACKING_URI": uri, "OMP_NUM_THREADS": "1"}
    log = scratch / "mlflow.log"
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    try:
        end = time.monotonic() + 180
        while time.monotonic() < end and process.poll() is None:
            try:
                if httpx.get(f"http://127.0.0.1:{port}/ping", trust_env=False).status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.2)
        else:
            told = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise ArtifactError(f"mlflow models serve did not start: {told[-1] if told else 'no output'}")
        yield port
    finally:
        stop(process)
        _stop_group(process.pid)


def _stop_group(group: int) -> None:
    """End the workers that a server leaves behind; the group is one that we started."""
    try:
        os.killpg(group, signal.SIGTERM)
        time.sleep(1.0)
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return
