"""What a served bundle does over HTTP: latency and rows a second, against MLflow's server and the bare pass.

Server and load generator share the machine, each a process of its own; the server has one worker. What a ratio
compares is measured in the same seconds, since the speed of a machine that others use too may double from one
minute to the next: both servers are up, an idle one takes less than a hundredth of a core, and all that a group
holds takes turns of half a second, round by round:

1, 100, 500 candidates
    ``sluice serve``, without exposures unless told, with each number of clients; of the first bundle
    ``mlflow models serve`` with the fewest; and among those of 500 the pass that the server runs for the candidates
    of one user, alone on one core while the servers are idle, without HTTP, JSON or encoding, and the same with
    layers in eight bits, where the bundle names some;
half of capacity
    one client; the number of clients that reached most requests a second with 100 candidates; and half of what they
    reached in this round, evenly spaced. In all three the generator is on the last core, the server on the others.
    Of these there are five times as many rounds: what slows a machine for a moment delays the next hundred
    requests, and a percentile of only some thousand tells whether such a moment came, not how often they come.

The figures of a cell are those of all its rounds together: percentiles of all latencies, rows of all rounds over
their seconds. Ratios are those of such figures, so that they can be checked by the table; the median of the rounds'
ratios scattered as much when it was tried. Only at half of capacity is each latency divided by the median of one
client in its own round, and the 99th percentile is that of these ratios. Where somebody else slows the machine to
half its speed for a twentieth of a second, half of the capacity is all of it, so the median of the rounds' own
percentiles is told too, and how often the machine stands still or is slow.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from pipelines.benchmarks.report import AtLeast, AtMost, BenchReport, JsonPath, known, progress

if TYPE_CHECKING:
    from pipelines.release.bundle import Bundle
    from serving.benchmarks.load import Load

K = TypeVar("K")
CLIENTS, CANDIDATES = (1, 8, 64), (1, 100, 500)
TURN = 0.5
"""Seconds of a turn, about."""
WARM = 0.2
"""Of a turn, before it, not counted."""
TAIL_ROUNDS = 5
"""Rounds at half of capacity for each of another cell."""
PASS, INT8 = "forward pass", "forward pass, int8"
CELL = ("p50_ms", "p95_ms", "p99_ms", "rows_per_second")
TAIL = "p99_half_over_p50"


def main(
    bundle: Annotated[
        list[Path] | None,
        typer.Option(
            help="A bundle, repeatable: the first is the small model, the last the large one.",
            show_default="untrained ones, FinalMLP of Frappe's ten fields and GDCN of 39",
        ),
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="Of each cell, in turns of half a second.")] = 5.0,
    clients: Annotated[list[int] | None, typer.Option(help="Repeatable.", show_default="1, 8, 64")] = None,
    mlflow: Annotated[bool, typer.Option(help="Compare with mlflow models serve.")] = True,
    int8: Annotated[
        bool, typer.Option(help="Let the server compute the layers in eight bits that the bundle names.")
    ] = False,
    events: Annotated[
        bool, typer.Option(help="Keep every exposure in SQLite, durable before the answer; MLflow keeps none.")
    ] = False,
    busy_poll_ms: Annotated[
        float, typer.Option(min=0.0, max=100.0, help="SLUICE_BUSY_POLL_MS of the server, whose core is its own.")
    ] = 1.0,
    json: JsonPath = None,
    at_least: AtLeast = None,
    at_most: AtMost = None,
) -> None:
    """Scores over HTTP: latencies and rows a second, against MLflow's server and the bare forward pass.

    Example: sluice bench serve --seconds 4 --at-least ratio_mlflow=10 --at-least ratio_forward=0.6
    """
    import torch
    from rich.console import Console

    from pipelines.release.bundle import Bundle
    from serving.benchmarks.cores import pauses
    from serving.benchmarks.synthetic import bundles

    torch.set_num_threads(1)
    columns = ["bundle", "server", "clients", "candidates", "p50 ms", "p95 ms", "p99 ms", "rows/s", "refused"]
    report = BenchReport(f"Serving, {seconds:g} s a cell, {os.cpu_count()} cores", columns)
    settings = {"SLUICE_INT8": str(int8).lower(), "SLUICE_BUSY_POLL_MS": str(busy_poll_ms)}
    many, rounds = sorted(set(clients or CLIENTS)), max(1, round(seconds / TURN))
    with tempfile.TemporaryDirectory() as scratch:
        served = [Bundle.load(path) for path in bundle or bundles(Path(scratch))]
        known(figures(served, many, mlflow=mlflow), at_least, at_most)
        report.figures |= pauses(seconds)
        with progress(Console(stderr=True), len(served) * (rounds * (len(CANDIDATES) + TAIL_ROUNDS) + 1)) as step:
            for place, one in enumerate(served):
                bench = _Bench(report, one, name_of(place, one), seconds / rounds, rounds, step)
                with bench.servers(Path(scratch), settings, events=events, mlflow=mlflow and place == 0) as up:
                    bench.measure(up, many)
                bench.against_forward(int8=int8, small=place == 0, large=one is served[-1])
                if mlflow and place == 0:
                    bench.against_mlflow(many[0])
    report.note(
        "rows/s of answers with status 200; one server process with one worker; latencies as a client sees them"
    )
    report.note(
        f"turns of {seconds / rounds:.2g} s, {rounds} a cell, {TAIL_ROUNDS * rounds} for half of capacity; "
        "what a ratio compares took turns"
    )
    report.note("every exposure durable before its answer" if events else "no exposures kept, as MLflow keeps none")
    report.note(f"the server stays awake for {busy_poll_ms:g} ms where requests come so soon (SLUICE_BUSY_POLL_MS)")
    report.note(
        "the machine alone stood still {machine_pauses_per_second:.1f} times a second, {machine_paused_share:.2%} "
        "of the time, {machine_longest_pause_ms:.1f} ms at most, and was slow {machine_slow_share:.2%} of the "
        "time".format_map(report.figures)
    )
    report.note("ratio_forward, ratio_forward_small: best rows/s with 500 candidates over those of the pass alone")
    report.note(
        "half: of capacity; it, capacity and one client unloaded have the generator on a core of its own; "
        "p99_half_over_p50: of latencies each over the median of one client in its round; "
        "p99_half_over_p50_median: the median of the rounds' own p99, likewise"
    )
    report.finish(json, at_least, at_most)


def name_of(place: int, bundle: Bundle) -> str:
    """Return how the figures name a bundle: by its place on the command line and its model."""
    return f"{place + 1}_{bundle.model.name}"


def figures(served: Sequence[Bundle], clients: Sequence[int], *, mlflow: bool) -> Iterator[str]:
    """Yield the names of all figures that there will be.

    Args:
        served: the bundles.
        clients: the numbers of clients.
        mlflow: whether its server is measured too.
    """
    yield from (
        f"machine_{what}" for what in ("pauses_per_second", "paused_share", "longest_pause_ms", "slow_share")
    )
    yield from ("ratio_forward", "ratio_forward_small")
    if mlflow:
        yield from ("ratio_mlflow", "ratio_mlflow_500", "p99_over_mlflow")
    for place, bundle in enumerate(served):
        name = name_of(place, bundle)
        cells = [f"sluice_{c}_{n}" for c in clients for n in CANDIDATES]
        cells += [f"sluice_{part}_100" for part in ("unloaded", "capacity", "half")]
        if mlflow and place == 0:
            cells += [f"mlflow_{clients[0]}_{n}" for n in CANDIDATES]
        yield from (f"{name}_{cell}_{what}" for cell in cells for what in CELL)
        yield from (f"{name}_{what}" for what in (TAIL, f"{TAIL}_median", "forward_rows_per_second"))
        if bundle.int8 is not None:
            yield f"{name}_int8_speedup"


@dataclass(frozen=True)
class _Server:
    """A server that is up.

    Args:
        name: in the table.
        port: on 127.0.0.1.
        path: to post to.
        bodies: of its requests, by their number of candidates.
    """

    name: str
    port: int
    path: str
    bodies: Mapping[int, Sequence[bytes]]


class _Bench:
    """The measurements of one bundle.

    Args:
        report: gets a row and figures for each cell.
        bundle: what is served.
        name: of its figures.
        turn: seconds.
        rounds: how many.
        step: called with what begins.
    """

    def __init__(
        self,
        report: BenchReport,
        bundle: Bundle,
        name: str,
        turn: float,
        rounds: int,
        step: Callable[[str], None],
    ) -> None:
        from serving.benchmarks.synthetic import requests

        self.report, self.bundle, self.name = report, bundle, name
        self.turn, self.rounds, self.step = turn, rounds, step
        self.requests = {n: requests(bundle, n) for n in CANDIDATES}
        self.cells: dict[tuple[str, int | None, int], Load] = {}

    @contextmanager
    def servers(
        self, scratch: Path, settings: Mapping[str, str], *, events: bool, mlflow: bool
    ) -> Iterator[list[_Server]]:
        """Start the server, and MLflow's of the same bundle if it is asked for, for as long as the block lasts."""
        from serving.benchmarks.mlflow_server import PATH, body, mlflow_server
        from serving.client import running_server

        self.step(f"{self.name}: the server starts")
        # What saturates it on purpose shall be measured, not refused.
        given = {"SLUICE_QUEUE_MS": "inf", "SLUICE_QUEUE_ROWS": "1000000", "OMP_NUM_THREADS": "1", **settings}
        given["SLUICE_EVENTS_URL"] = f"sqlite:///{scratch}/{self.name}.db" if events else "none"
        given["SLUICE_EVENTS_SPOOL"] = str(scratch / "spool")
        with ExitStack() as up:
            log = scratch / f"{self.name}.log"
            ours = up.enter_context(running_server(str(self.bundle.directory), log=log, environment=given))
            assert ours.base_url.port is not None
            bodies = {n: [json.dumps(r).encode() for r in many] for n, many in self.requests.items()}
            found = [_Server("sluice", ours.base_url.port, "/v1/score", bodies)]
            if mlflow:
                port = up.enter_context(mlflow_server(self.bundle, scratch))
                found.append(
                    _Server("mlflow", port, PATH, {n: [body(r) for r in many] for n, many in self.requests.items()})
                )
            yield found

    def measure(self, servers: list[_Server], clients: list[int]) -> None:
        """Measure all cells, the first server's with each number of clients, the other's with the fewest."""
        ours, *others = servers
        for n in CANDIDATES:
            turns: dict[tuple[str, int | None], Callable[[], Load]]
            turns = {(ours.name, c): partial(self._load, ours, n, c) for c in clients}
            turns |= {(one.name, clients[0]): partial(self._load, one, n, clients[0]) for one in others}
            if n == 500:
                turns |= {(name, None): turn for name, turn in self._passes(n).items()}
            for (name, c), cell in self._in_turns(f"{n} candidates", turns, self.rounds).items():
                self.cells[name, c, n] = cell
                self._tell(name, c or "", n, cell, f"{name}_{c}_{n}" if c else "")
        self._half(ours, max(clients, key=lambda c: self.cells[ours.name, c, 100].requests_per_second))

    def _half(self, server: _Server, most: int) -> None:
        """Measure one client, as many as reach capacity, and half of that, with 100 candidates."""
        import numpy as np

        from serving.benchmarks.cores import apart
        from serving.benchmarks.load import Load
        from serving.benchmarks.open_loop import offer

        rate, calm, warm = 0.0, 0.0, self.turn * WARM
        ratios: list[np.ndarray] = []

        def unloaded() -> Load:
            nonlocal calm
            found = self._load(server, 100, 1)
            calm = found.milliseconds(50) / 1000
            return found

        def capacity() -> Load:
            nonlocal rate
            found = self._load(server, 100, most)
            rate = found.requests_per_second / 2
            return found

        def half() -> Load:
            phases = [(rate, warm), (rate, self.turn)]
            found = offer(server.port, server.path, server.bodies[100], phases).during(warm, warm + self.turn)
            good = found.status == 200
            ratios.append(found.taken[good] / calm)
            return Load(100, self.turn, found.taken[good].tolist(), Counter(found.status[~good].tolist()))

        clients: dict[str, int | str] = {"unloaded": 1, "capacity": most, "half": "open"}
        turns: dict[str, Callable[[], Load]] = {"unloaded": unloaded, "capacity": capacity, "half": half}
        with apart(server.port, first=True):
            found = self._in_turns("half of capacity", turns, TAIL_ROUNDS * self.rounds)
        for part, cell in found.items():
            self._tell(f"{server.name}, {part}", clients[part], 100, cell, f"{server.name}_{part}_100")
        tails = [float(np.percentile(one, 99)) for one in ratios]
        self.report.figures[f"{self.name}_{TAIL}"] = float(np.percentile(np.concatenate(ratios), 99))
        self.report.figures[f"{self.name}_{TAIL}_median"] = float(np.median(tails))

    def _passes(self, n: int) -> dict[str, Callable[[], Load]]:
        """Return what a turn of the pass alone is, and of the one in eight bits."""
        from serving.benchmarks.load import calls
        from serving.scorer import Scorer, card_of

        ways = {PASS: False} | ({INT8: True} if self.bundle.int8 is not None else {})
        scorers = {name: Scorer(self.bundle, card_of(self.bundle), int8=int8) for name, int8 in ways.items()}
        encoded = scorers[PASS].encode(**self.requests[n][0])
        return {
            name: partial(calls, partial(one.run, [encoded]), rows=n, seconds=self.turn, warm=self.turn * WARM)
            for name, one in scorers.items()
        }

    def against_forward(self, *, int8: bool, small: bool, large: bool) -> None:
        """Set the best cell of 500 candidates against the pass that the server runs."""
        figures = self.report.figures
        rates = {who: cell.rows_per_second for (who, c, _), cell in self.cells.items() if c is None}
        served = [one.rows_per_second for (who, c, n), one in self.cells.items() if who == "sluice" and n == 500]
        ratio = max(served) / rates[INT8 if int8 and INT8 in rates else PASS]
        figures[f"{self.name}_forward_rows_per_second"] = rates[PASS]
        if small:
            figures["ratio_forward_small"] = ratio
        if large:
            figures["ratio_forward"] = ratio
        if INT8 in rates:
            figures[f"{self.name}_int8_speedup"] = rates[INT8] / rates[PASS]

    def against_mlflow(self, clients: int) -> None:
        """Set the server against MLflow's with as many clients."""
        ours, theirs = ({n: self.cells[who, clients, n] for n in CANDIDATES} for who in ("sluice", "mlflow"))
        ratios = {n: ours[n].rows_per_second / theirs[n].rows_per_second for n in CANDIDATES}
        self.report.figures |= {
            "ratio_mlflow": min(ratios[1], ratios[100]),
            "ratio_mlflow_500": ratios[500],
            "p99_over_mlflow": max(ours[n].milliseconds(99) / theirs[n].milliseconds(99) for n in CANDIDATES),
        }

    def _in_turns(self, what: str, turns: Mapping[K, Callable[[], Load]], rounds: int) -> dict[K, Load]:
        from serving.benchmarks.load import in_turns

        return in_turns(turns, rounds, lambda number: self.step(f"{self.name}: {what}, round {number} of {rounds}"))

    def _load(self, server: _Server, n: int, clients: int) -> Load:
        from serving.benchmarks.load import load

        bodies = server.bodies[n]
        return load(
            server.port, server.path, bodies, rows=n, clients=clients, seconds=self.turn, warm=self.turn * WARM
        )

    def _tell(self, who: str, clients: int | str, n: int, cell: Load, key: str) -> None:
        """Add a row, and the cell's figures unless it has no key."""
        told = (*(cell.milliseconds(q) for q in (50, 95, 99)), cell.rows_per_second)
        self.report.row(self.name, who, clients, n, *told, sum(cell.others.values()))
        if key:
            self.report.figures |= {f"{self.name}_{key}_{what}": one for what, one in zip(CELL, told, strict=True)}
