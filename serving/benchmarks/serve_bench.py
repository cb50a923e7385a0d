"""What a served bundle does over HTTP: latency and rows a second, against MLflow's server and the bare pass.

Server and load generator share the machine, each a process of its own; the server has one worker. How often the
machine itself stands still is measured too. All figures of a bundle come from one run, one after the other:

served
    ``sluice serve``, without exposures unless told: some seconds for each number of clients and of candidates;
half
    at half of the requests a second that it reached with 100 candidates, evenly spaced, with the generator on the
    last core and the server on the others;
forward
    the pass that the server runs for 500 candidates of one user, alone on one core, without HTTP, JSON or encoding,
    and the same with layers in eight bits, where the bundle names some;
mlflow
    ``mlflow models serve`` of the first bundle, one client.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipelines.benchmarks.report import AtLeast, AtMost, BenchReport, JsonPath, progress

if TYPE_CHECKING:
    from pipelines.release.bundle import Bundle
    from serving.benchmarks.load import Load

CLIENTS, CANDIDATES = (1, 8, 64), (1, 100, 500)
REQUESTS = 16
"""Different requests of each size, sent in turn."""
FRAPPE = dict(
    user=957, item=4082, daytime=7, weekday=7, weekend=2, homework=3, cost=2, weather=9, country=80, city=233
)
FINALMLP = {
    "name": "finalmlp",
    "mlp1": {"hidden": [400], "batch_norm": True},
    "mlp2": {"hidden": [100], "batch_norm": True},
    "heads": 5,
    "gates": {"feature": {"name": "sigmoid2", "context": ["user", "item"], "hidden": [400]}},
}


def main(
    bundle: Annotated[
        list[Path] | None,
        typer.Option(
            help="A bundle, repeatable: the first is the small model, the last the large one.",
            show_default="untrained ones, FinalMLP of Frappe's ten fields and GDCN of 39",
        ),
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="Of each cell, a warm-up of a fifth not counted.")] = 5.0,
    clients: Annotated[list[int] | None, typer.Option(help="Repeatable.", show_default="1, 8, 64")] = None,
    mlflow: Annotated[bool, typer.Option(help="Compare with mlflow models serve.")] = True,
    int8: Annotated[
        bool, typer.Option(help="Let the server compute the layers in eight bits that the bundle names.")
    ] = False,
    events: Annotated[
        bool, typer.Option(help="Keep every exposure in SQLite, durable before the answer; MLflow keeps none.")
    ] = False,
    json: JsonPath = None,
    at_least: AtLeast = None,
    at_most: AtMost = None,
) -> None:
    """Scores over HTTP: latencies and rows a second, against MLflow's server and the bare forward pass.

    Example: sluice bench serve --seconds 4 --at-least ratio_mlflow=10 --at-least ratio_forward=0.6
    """
    import torch
    from rich.console import Console

    from serving.benchmarks.cores import pauses

    torch.set_num_threads(1)
    columns = ["bundle", "server", "clients", "candidates", "p50 ms", "p95 ms", "p99 ms", "rows/s", "refused"]
    report = BenchReport(f"Serving, {seconds:g} s a cell, {os.cpu_count()} cores", columns)
    many = tuple(clients or CLIENTS)
    report.figures |= pauses(seconds)
    with tempfile.TemporaryDirectory() as scratch:
        paths = bundle or synthetic(Path(scratch))
        steps = len(paths) * (len(many) * len(CANDIDATES) + 2) + (len(CANDIDATES) + 1 if mlflow else 0)
        with progress(Console(stderr=True), steps) as step:
            for place, path in enumerate(paths):
                bench = _Bench(report, path, place, Path(scratch), seconds, step, int8=int8, events=events)
                bench.served(many)
                bench.forward(small=place == 0, large=place == len(paths) - 1)
                if mlflow and place == 0:
                    bench.mlflow()
    report.note(
        "rows/s of answers with status 200; one server process with one worker; latencies as a client sees them"
    )
    report.note("every exposure durable before its answer" if events else "no exposures kept, as MLflow keeps none")
    report.note(
        "the machine alone stood still {machine_pauses_per_second:.1f} times a second, {machine_paused_share:.2%} "
        "of the time, {machine_longest_pause_ms:.1f} ms at most".format_map(report.figures)
    )
    report.note("ratio_forward, ratio_forward_small: best rows/s with 500 candidates over those of the pass alone")
    report.finish(json, at_least, at_most)


class _Bench:
    """The measurements of one bundle."""

    def __init__(
        self,
        report: BenchReport,
        path: Path,
        place: int,
        scratch: Path,
        seconds: float,
        step: Any,
        *,
        int8: bool,
        events: bool,
    ) -> None:
        from pipelines.release.bundle import Bundle

        self.report, self.scratch, self.seconds, self.step = report, scratch, seconds, step
        self.int8, self.events = int8, events
        self.bundle = Bundle.load(path)
        self.name = f"{place + 1}_{self.bundle.manifest['model']['name']}"
        self.requests = {n: requests(self.bundle, n) for n in CANDIDATES}
        self.cells: dict[tuple[str, int, int], Load] = {}

    def served(self, clients: tuple[int, ...]) -> None:
        """Start the server and load it."""
        from serving.client import running_server

        bodies = {n: [json.dumps(r).encode() for r in many] for n, many in self.requests.items()}
        # What saturates it on purpose shall be measured, not refused.
        given = {"SLUICE_QUEUE_MS": "60000", "SLUICE_QUEUE_ROWS": "1000000", "OMP_NUM_THREADS": "1"}
        given["SLUICE_INT8"] = str(self.int8).lower()
        given["SLUICE_EVENTS_URL"] = f"sqlite:///{self.scratch}/{self.name}.db" if self.events else "none"
        given["SLUICE_EVENTS_SPOOL"] = str(self.scratch / "spool")
        log = self.scratch / f"{self.name}.log"
        with running_server(str(self.bundle.directory), log=log, environment=given) as client:
            port = client.base_url.port
            assert port is not None
            for n in CANDIDATES:
                for c in clients:
                    self._cell("sluice", port, "/v1/score", bodies[n], n, c)
            capacity = max(self.cells["sluice", c, 100].requests_per_second for c in clients)
            p99 = self._half(port, bodies[100], capacity / 2)
        unloaded = self.cells["sluice", min(clients), 100].milliseconds(50)
        self.report.figures[f"{self.name}_p99_half_over_p50"] = p99 / unloaded

    def _half(self, port: int, bodies: list[bytes], rate: float) -> float:
        """Offer requests of 100 candidates at a rate; return the p99 in milliseconds."""
        from serving.benchmarks.cores import apart
        from serving.benchmarks.open_loop import offer

        self.step(f"{self.name}: sluice, 100 candidates, at half")
        warm = self.seconds / 5
        with apart(port):
            found = offer(port, "/v1/score", bodies, [(rate, warm), (rate, self.seconds)])
        found = found.during(warm, warm + self.seconds)
        p50, p95, p99 = (found.milliseconds(200, q) for q in (50, 95, 99))
        rows = 100 * found.count(200) / self.seconds
        others = len(found) - found.count(200)
        self.report.row(self.name, f"sluice {rate:,.0f}/s", "open", 100, p50, p95, p99, rows, others)
        key = f"{self.name}_sluice_half_100"
        self.report.figures |= {
            f"{key}_p50_ms": p50,
            f"{key}_p95_ms": p95,
            f"{key}_p99_ms": p99,
            f"{key}_rows_per_second": rows,
        }
        return p99

    def forward(self, *, small: bool, large: bool) -> None:
        """Time the pass alone."""
        from pipelines.benchmarks.measure import timed
        from serving.scorer import Scorer, card_of

        self.step(f"{self.name}: forward")
        scorers = {"forward pass": Scorer(self.bundle, card_of(self.bundle))}
        if self.bundle.int8 is not None:
            scorers["forward pass, int8"] = Scorer(self.bundle, card_of(self.bundle), int8=True)
        encoded = scorers["forward pass"].encode(**self.requests[500][0])
        taken = timed({name: partial(scorer.run, [encoded]) for name, scorer in scorers.items()}, 5, "cpu")
        rate = 500 / taken["forward pass"]
        best = max(cell.rows_per_second for (server, _, n), cell in self.cells.items() if n == 500)
        figures = self.report.figures
        figures[f"{self.name}_forward_rows_per_second"] = rate
        if small:
            figures["ratio_forward_small"] = best / rate
        if large:
            figures["ratio_forward"] = best / rate
        for name, seconds in taken.items():
            self.report.row(self.name, name, "", 500, 1000 * seconds, "", "", 500 / seconds, "")
        if len(taken) > 1:
            figures[f"{self.name}_int8_speedup"] = taken["forward pass"] / taken["forward pass, int8"]

    def mlflow(self) -> None:
        """Serve the bundle by MLflow, and set ours with one client against it."""
        self.step(f"{self.name}: mlflow starts")
        with _mlflow_server(self.bundle, self.scratch) as port:
            for n in CANDIDATES:
                bodies = [json.dumps({"dataframe_split": _table(r)}).encode() for r in self.requests[n]]
                self._cell("mlflow", port, "/invocations", bodies, n, 1)
        few = min(c for _, c, _ in self.cells)
        ours = {n: self.cells["sluice", few, n] for n in CANDIDATES}
        theirs = {n: self.cells["mlflow", 1, n] for n in CANDIDATES}
        ratios = {n: ours[n].rows_per_second / theirs[n].rows_per_second for n in CANDIDATES}
        self.report.figures["ratio_mlflow"] = min(ratios[1], ratios[100])
        self.report.figures["ratio_mlflow_500"] = ratios[500]
        self.report.figures["p99_over_mlflow"] = max(
            ours[n].milliseconds(99) / theirs[n].milliseconds(99) for n in CANDIDATES
        )

    def _cell(self, server: str, port: int, path: str, bodies: list[bytes], n: int, clients: int) -> None:
        from serving.benchmarks.load import load

        self.step(f"{self.name}: {server}, {clients} clients, {n} candidates")
        load(port, path, bodies, rows=n, clients=clients, seconds=self.seconds / 5)
        found = load(port, path, bodies, rows=n, clients=clients, seconds=self.seconds)
        self.cells[server, clients, n] = found
        p50, p95, p99 = (found.milliseconds(q) for q in (50, 95, 99))
        refused = sum(found.others.values())
        self.report.row(self.name, server, clients, n, p50, p95, p99, found.rows_per_second, refused)
        key = f"{self.name}_{server}_{clients}_{n}"
        self.report.figures |= {
            f"{key}_p50_ms": p50,
            f"{key}_p95_ms": p95,
            f"{key}_p99_ms": p99,
            f"{key}_rows_per_second": found.rows_per_second,
        }


def requests(bundle: Bundle, candidates: int) -> list[dict[str, Any]]:
    """Return requests of random values: those of the vocabularies, and where there is none, of the golden rows."""
    import numpy as np

    from pipelines.features.spec import Vocabulary
    from pipelines.release.bundle import SCORE
    from serving.scorer import plain_row

    make = np.random.default_rng(0)
    spec, golden = bundle.state.spec, bundle.golden.drop(SCORE)
    values = {name: golden[name].to_list() for name in golden.columns}
    for c in spec.direct:
        if c.kind == "categorical" and c.column in values:
            table = bundle.state.table(c)
            if isinstance(table.encoding, Vocabulary):
                values[c.column] = table.known()[0].to_list()
    role = {(c.name if c.from_log else c.column): c.role for c in spec.direct}

    def draw(wanted: str) -> dict[str, Any]:
        names = [name for name in values if role[name] == wanted]
        return plain_row({name: values[name][make.integers(len(values[name]))] for name in names})

    return [
        {"user": draw("user"), "context": draw("context"), "candidates": [draw("item") for _ in range(candidates)]}
        for _ in range(REQUESTS)
    ]


def synthetic(folder: Path) -> list[Path]:
    """Write two bundles of untrained models: FinalMLP of Frappe's fields, GDCN of 26 categories and 13 numbers."""
    large = {f"c{i}": (10, 100, 1_000, 10_000)[i % 4] for i in range(26)}
    roles = {name: "user" if i < 10 else "item" if i < 20 else "context" for i, name in enumerate(large)}
    frappe_roles = {"user": "user", "item": "item", "cost": "item"}
    return [
        _untrained(folder / "frappe", FRAPPE, frappe_roles, 0, 10, FINALMLP),
        _untrained(folder / "large", large, roles, 13, 16, {"name": "gdcn"}),
    ]


def _untrained(
    path: Path, sizes: dict[str, int], roles: dict[str, str], numbers: int, dim: int, model: dict[str, Any]
) -> Path:
    import numpy as np
    import polars as pl
    import torch

    from ctr_models.model import ModelSpec
    from pipelines.features.spec import FeatureSpec
    from pipelines.features.state import FeatureState
    from pipelines.features.transform import encoded_rows, transform
    from pipelines.release.bundle import Bundle
    from pipelines.release.int8 import scores

    make, rows = np.random.default_rng(0), 2 * max(sizes.values())
    log = pl.DataFrame(
        {"label": make.integers(0, 2, rows)}
        | {name: [f"{name}-{value}" for value in make.permutation(rows) % size] for name, size in sizes.items()}
        | {f"n{i}": np.round(make.lognormal(size=rows), 3) for i in range(numbers)}
    )
    columns = [{"name": n, "kind": "categorical", "role": roles.get(n, "context")} for n in sizes]
    columns += [{"name": f"n{i}", "kind": "numeric", "role": "item"} for i in range(numbers)]
    spec = FeatureSpec.model_validate({"label": "label", "dim": dim, "columns": columns})
    state = FeatureState.fit(spec, log.lazy(), source="made")
    torch.manual_seed(0)
    built = ModelSpec.parse(model).build(state.schema())
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    some = encoded_rows(transform(state, log.lazy(), source="made").collect(), state.schema())
    some.label[:] = make.random(rows) < scores(built.eval(), some)  # in this world the model is right
    options: dict[str, Any] = {"config": {"name": path.name}, "metrics": {}, "golden": log.head(32)}
    Bundle.create(path, model=built, state=state, seen=some, **options)
    return path


def _table(request: dict[str, Any]) -> dict[str, Any]:
    """The request as the plain rows that MLflow takes."""
    rows = [{**request["user"], **request["context"], **candidate} for candidate in request["candidates"]]
    names = list(dict.fromkeys(name for row in rows for name in row))
    return {"columns": names, "data": [[row.get(name) for name in names] for row in rows]}


@contextmanager
def _mlflow_server(bundle: Bundle, scratch: Path) -> Iterator[int]:
    """Run ``mlflow models serve`` of the bundle for as long as the block lasts."""
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
    import signal

    try:
        os.killpg(group, signal.SIGTERM)
        time.sleep(1.0)
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return
