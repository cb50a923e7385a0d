"""A server under more than it can do: what it accepts stays quick, the rest is refused at once, and it recovers.

Server and load generator share the machine, the generator on the last core, the server, of one worker and with the
limits of the defaults, on the others. One run, one part after the other:

capacity
    a closed loop of 8 and of 64 clients; capacity is the better of the two, and the p99 at capacity that with 64,
    of a server that is busy all the time and has no more to do than it can;
calm
    an open loop at a tenth of capacity;
overload
    an open loop at four times capacity: requests come whether or not others were answered;
after
    a tenth again, from one moment to the next.

Latencies of an open loop count from when a request was due, whoever is to blame; what was really offered is told.
"""

from __future__ import annotations

import json
import os
import tempfile
from math import nan
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipelines.benchmarks.report import AtLeast, AtMost, BenchReport, JsonPath, known, progress

if TYPE_CHECKING:
    from collections.abc import Callable

    from pipelines.release.bundle import Bundle
    from serving.benchmarks.load import Load
    from serving.benchmarks.open_loop import Answers

CLIENTS = (8, 64)
CANDIDATES = 100
CALM = 0.1
"""Of capacity, before and after the overload."""
RUN = 10
"""Answers in a row by which recovery is told."""
PATH = "/v1/score"
FIGURES = (
    *("capacity_requests_per_second", "capacity_p99_ms", "offered_over_capacity", "accepted_over_capacity"),
    *("accepted_p99_ms", "p99_over_capacity", "refused_share", "refused_p50_ms", "refused_p99_ms", "failed"),
    *("recovery_s", "memory_growth_mb", "memory_late_growth_mb"),
)


def main(
    bundle: Annotated[
        Path | None,
        typer.Option(help="What is served.", show_default="an untrained FinalMLP of Frappe's ten fields"),
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.3, help="Of overload; the other parts take a sixth each.")] = 60.0,
    times: Annotated[float, typer.Option(min=1.0, help="The overload, in capacities.")] = 4.0,
    json: JsonPath = None,
    at_least: AtLeast = None,
    at_most: AtMost = None,
) -> None:
    """Overload of a server: latency of what it accepts, refusals, memory, recovery.

    Example: sluice bench overload --seconds 60 --at-most p99_over_capacity=2 --at-most failed=0
    """
    import torch
    from rich.console import Console

    from pipelines.release.bundle import Bundle
    from serving.benchmarks.synthetic import bundles

    known(FIGURES, at_least, at_most)
    torch.set_num_threads(1)
    columns = ["part", "asked req/s", "sent req/s", "200 req/s", "p50 ms", "p99 ms", "503 req/s", "503 p99 ms"]
    report = BenchReport(f"Overload, {times:g} times capacity, {seconds:g} s, {os.cpu_count()} cores", columns)
    with tempfile.TemporaryDirectory() as scratch:
        served = Bundle.load(bundle or bundles(Path(scratch))[0])
        with progress(Console(stderr=True), len(CLIENTS) + 2) as step:
            _measure(report, served, Path(scratch), seconds, times, step)
    report.note("one server process with one worker, default limits, no exposures kept")
    report.note("open loops count from when a request was due")
    report.note("p99_over_capacity: p99 of answers 200 under overload, over that of the closed loop at capacity")
    report.finish(json, at_least, at_most)


def _measure(
    report: BenchReport,
    bundle: Bundle,
    scratch: Path,
    seconds: float,
    times: float,
    step: Callable[[str], None],
) -> None:
    import psutil

    from serving.benchmarks.cores import apart
    from serving.benchmarks.open_loop import offer
    from serving.benchmarks.synthetic import requests
    from serving.client import running_server

    bodies = [json.dumps(r).encode() for r in requests(bundle, CANDIDATES)]
    part = seconds / 6
    step("the server starts")
    given = {"OMP_NUM_THREADS": "1", "SLUICE_EVENTS_URL": "none"}
    with running_server(str(bundle.directory), log=scratch / "server.log", environment=given) as client:
        port = client.base_url.port
        assert port is not None
        server = next(one for one in psutil.Process().children() if str(port) in one.cmdline())
        memory: list[tuple[float, int]] = []
        with apart(port):
            cells = _capacity(report, port, bodies, part, step)
            rate, p99 = max(cell.requests_per_second for cell in cells), cells[-1].milliseconds(99)
            phases = [(CALM * rate, part), (times * rate, seconds), (CALM * rate, part)]
            step("overload")
            answers = offer(
                port,
                PATH,
                bodies,
                phases,
                every=min(0.5, part / 4),
                watch=lambda at: memory.append((at, server.memory_info().rss)),
            )
    begin, end = part, part + seconds
    calm, over, after = (
        _part(report, name, answers, at, *phase)
        for name, at, phase in zip(("calm", "overload", "after"), (0.0, begin, end), phases, strict=True)
    )
    within = 2 * calm.milliseconds(200, 50) / 1000
    report.figures |= {
        "capacity_requests_per_second": rate,
        "capacity_p99_ms": p99,
        "offered_over_capacity": over.sent_by(end) / seconds / rate,
        "accepted_over_capacity": over.count(200) / seconds / rate,
        "accepted_p99_ms": over.milliseconds(200, 99),
        "p99_over_capacity": over.milliseconds(200, 99) / p99,
        "refused_share": over.count(503) / len(over),
        "refused_p50_ms": over.milliseconds(503, 50),
        "refused_p99_ms": over.milliseconds(503, 99),
        "failed": float(sum(one.failed for one in (calm, over, after))),
        "recovery_s": recovery(after, end, within),
        **growth(memory, begin, end),
    }


def _capacity(
    report: BenchReport, port: int, bodies: list[bytes], seconds: float, step: Callable[[str], None]
) -> list[Load]:
    """Return the closed loops of few and of many clients; rows tell of each."""
    from serving.benchmarks.load import load

    cells = []
    for clients in CLIENTS:
        step(f"{clients} clients")
        cell = load(port, PATH, bodies, rows=CANDIDATES, clients=clients, seconds=seconds, warm=seconds / 5)
        p50, p99, refused = cell.milliseconds(50), cell.milliseconds(99), cell.others.get(503, 0) / cell.seconds
        rate = cell.requests_per_second
        report.row(f"{clients} clients", "", "", rate, p50, p99, refused, "")
        cells.append(cell)
    return cells


def _part(report: BenchReport, name: str, answers: Answers, begin: float, asked: float, seconds: float) -> Answers:
    """Return the answers of a part; a row tells of them."""
    found = answers.during(begin, begin + seconds)
    report.row(
        name,
        asked,
        found.sent_by(begin + seconds) / seconds,
        found.count(200) / seconds,
        found.milliseconds(200, 50),
        found.milliseconds(200, 99),
        found.count(503) / seconds,
        found.milliseconds(503, 99),
    )
    return found


def recovery(after: Answers, end: float, within: float) -> float:
    """Return the seconds from the end of the overload until answers are as they were before it.

    That is from when the first of ``RUN`` requests in a row was due that all got 200, half of them in time.

    Args:
        after: what became of the requests that came then.
        end: of the overload, on the same clock.
        within: seconds that an answer may take.

    Returns:
        infinity if that never happened.

    Example:
        >>> import numpy as np
        >>> from serving.benchmarks.open_loop import Answers
        >>> status = np.array([503, 200] + [200] * 11)
        >>> taken = np.array([0.001, 9.0, 9.0] + [0.001] * 10)
        >>> recovery(Answers(60 + 0.1 * np.arange(13), np.zeros(13), taken, status), 60, 0.003)
        0.1
    """
    import numpy as np

    good = after.status == 200
    for first in range(len(after) - RUN + 1):
        these = slice(first, first + RUN)
        if good[these].all() and np.median(after.taken[these]) <= within:
            return round(float(after.due[first]) - end, 3)
    return float("inf")


def growth(memory: list[tuple[float, int]], begin: float, end: float) -> dict[str, float]:
    """Return by how much a server grew in an overload: at most, and from its first half to its second.

    Args:
        memory: (seconds, resident bytes).
        begin, end: of the overload; there must have been a look before it, and nan is for a half without one.

    Example:
        >>> growth([(0, 10 * 2**20), (1, 12 * 2**20), (2, 15 * 2**20), (3, 99 * 2**20)], 1, 3)
        {'memory_growth_mb': 5.0, 'memory_late_growth_mb': 3.0}
    """
    before = next(held for at, held in reversed(memory) if at < begin)
    half = (begin + end) / 2
    first = max((held for at, held in memory if begin <= at < half), default=nan)
    late = max((held for at, held in memory if half <= at < end), default=nan)
    mb = 2**20
    return {"memory_growth_mb": (max(first, late) - before) / mb, "memory_late_growth_mb": (late - first) / mb}
