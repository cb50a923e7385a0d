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
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctr_models.errors import ArtifactError, RequestError

if TYPE_CHECKING:
    import httpx

_BATCH = "/v1/score:batch"


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


def score(
    server: httpx.Client, requests: Sequence[Mapping[str, Any]], *, arrow: bool = False
) -> list[dict[str, Any]]:
    """Ask for the scores of many requests in one call of ``/v1/score:batch``.

    Args:
        server: with its address, and the key if one is needed.
        requests: the fields of ``/v1/score``; candidates may be a polars frame, which Arrow sends as it is.
        arrow: send and take Arrow, not JSON: quicker for many candidates.

    Returns:
        a reply each: ``status``, and ``scores`` or ``detail``. Of Arrow, scores are an array, (N,) float32.

    Raises:
        RequestError: the call as a whole was refused.
    """
    if arrow:
        kind = "application/vnd.apache.arrow.stream"
        reply = server.post(_BATCH, content=_stream(requests), headers={"Content-Type": kind, "Accept": kind})
    else:
        reply = server.post(_BATCH, json={"requests": [_plain(request) for request in requests]})
    if reply.status_code != 200:
        problem = reply.json()["detail"][0]
        raise RequestError(problem["msg"], where=".".join(map(str, problem["loc"])))
    if not arrow:
        return list(reply.json()["replies"])
    import pyarrow as pa

    batch = pa.ipc.open_stream(reply.content).read_next_batch()
    replies = batch.drop_columns(["scores"]).to_pylist(maps_as_pydicts="strict")
    told = [{name: value for name, value in one.items() if value is not None} for one in replies]
    for one, scores in zip(told, batch["scores"], strict=True):
        if scores.is_valid:
            one["scores"] = scores.values.to_numpy()
    return told


def _plain(request: Mapping[str, Any]) -> dict[str, Any]:
    candidates = request["candidates"]
    return {**request, "candidates": candidates if isinstance(candidates, list) else candidates.to_dicts()}


def _stream(requests: Sequence[Mapping[str, Any]]) -> bytes:
    """Return requests as an Arrow stream of one record batch, a row each."""
    import polars as pl
    import pyarrow as pa

    rest = [{name: value for name, value in one.items() if name != "candidates"} for one in requests]
    frames = [
        c if isinstance(c := one["candidates"], pl.DataFrame) else pl.from_dicts(c, infer_schema_length=None)
        for one in requests
    ]
    # The places keep candidates that give no column.
    placed = pl.concat([frame.with_row_index("__place__") for frame in frames], how="diagonal_relaxed")
    table = placed.drop("__place__").rechunk().to_arrow(compat_level=pl.CompatLevel.oldest())
    rows = pa.array([{}] * len(placed), pa.struct([]))
    if table.num_columns:
        columns = [pa.concat_arrays(column.chunks) for column in table.columns]
        rows = pa.StructArray.from_arrays(columns, names=table.column_names)
    offsets = pa.array([0, *accumulate(map(len, frames))], pa.int32())
    names = dict.fromkeys(name for one in rest for name in one)
    given = {name: pa.array([one.get(name) for one in rest]) for name in names}
    batch = pa.record_batch({**given, "candidates": pa.ListArray.from_arrays(offsets, rows)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()
