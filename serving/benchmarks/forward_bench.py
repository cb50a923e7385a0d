"""The ways to compute a bundle's pass: those that a server times when it loads one, and the one that it leaves out.

``eager``, ``traced`` and ``int8`` are those of :class:`serving.forward.Forward`. ``exported`` is the program of
``torch.export``, which servers do not make: this says what it would cost, and what it would give.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipelines.benchmarks.report import AtLeast, AtMost, BenchReport, JsonPath, known

if TYPE_CHECKING:
    from pipelines.release.bundle import Bundle
    from serving.forward import Way

WAYS = ("eager", "traced", "int8", "exported")
TURN = 0.01
"""Seconds that a way's turn takes about."""


def main(
    bundle: Annotated[
        list[Path] | None,
        typer.Option(
            help="A bundle, repeatable.",
            show_default="untrained ones: FinalMLP of Frappe's ten fields, GDCN of 39, DIN with histories",
        ),
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.01, help="Of each cell, in turns of ten milliseconds.")] = 0.25,
    json: JsonPath = None,
    at_least: AtLeast = None,
    at_most: AtMost = None,
) -> None:
    """Ways to compute a pass: milliseconds by candidates, and the seconds that it takes to load them.

    Example: sluice bench forward --at-least exported_over_best=1
    """
    import torch

    from pipelines.benchmarks.measure import timed
    from pipelines.release.bundle import Bundle
    from pipelines.release.example import example_bundle
    from serving.benchmarks.serve_bench import name_of
    from serving.benchmarks.synthetic import bundles, requests
    from serving.forward import MEASURED_ROWS
    from serving.scorer import Scorer, card_of

    torch.set_num_threads(1)
    columns = ["bundle", "way", "load s", *(f"{rows} candidates, ms" for rows in MEASURED_ROWS)]
    report, ratios = BenchReport(f"Forward passes, {seconds:g} s a cell, one core", columns), list[float]()
    rounds = max(1, round(seconds / TURN))
    with tempfile.TemporaryDirectory() as scratch:
        made = [] if bundle else [example_bundle(Path(scratch) / "lists", model="din").directory]
        served = {}
        for place, path in enumerate(bundle or [*bundles(Path(scratch)), *made]):
            loaded = Bundle.load(path)
            served[name_of(place, loaded)] = loaded
        known(figures(served, MEASURED_ROWS), at_least, at_most)
        for name, loaded in served.items():
            begin = time.perf_counter()
            scorer = Scorer(loaded, card_of(loaded), int8=True)
            load = time.perf_counter() - begin
            begin = time.perf_counter()
            ways = {**scorer.forward.ways, "exported": exported(loaded)}
            export = time.perf_counter() - begin
            taken: dict[str, list[float]] = {way: [] for way in ways}
            for rows in MEASURED_ROWS:
                some = scorer.encode(**requests(loaded, rows)[0])
                calls: dict[str, Callable[[], Any]] = {way: partial(one, [some]) for way, one in ways.items()}
                with torch.inference_mode():
                    found = timed(calls, rounds, "cpu", least=TURN)
                for way, one in found.items():
                    taken[way].append(1000 * one)
                    report.figures[f"{name}_{way}_{rows}_ms"] = 1000 * one
                ratios.append(found["exported"] / min(one for way, one in found.items() if way != "exported"))
            for way, times in taken.items():
                first = (loaded.model.name, load) if way == "eager" else ("", export if way == "exported" else "")
                report.row(first[0], way, first[1], *times)
            report.figures |= {f"{name}_load_seconds": load, f"{name}_export_seconds": export}
    report.figures["exported_over_best"] = min(ratios)
    report.note("load s: beside eager all that a server does with a verified bundle; of exported the program alone")
    report.note("exported_over_best: its time over that of the fastest other way, where that is least")
    report.finish(json, at_least, at_most)


def figures(names: Iterable[str], sizes: Sequence[int]) -> Iterator[str]:
    """Yield the names of all figures that there may be: not every bundle has every way.

    Args:
        names: of the bundles.
        sizes: numbers of candidates.
    """
    yield "exported_over_best"
    for name in names:
        yield from (f"{name}_load_seconds", f"{name}_export_seconds")
        yield from (f"{name}_{way}_{rows}_ms" for way in WAYS for rows in sizes)


def exported(bundle: Bundle) -> Way:
    """Return a bundle's model as the program of ``torch.export``; it takes lists and histories too."""
    import torch

    from ctr_models.export import export, tensors
    from ctr_models.int8 import definitions
    from serving.batching import Encoded
    from serving.forward import plain

    with definitions(bundle.model):
        program = export(bundle.model).module()

    def way(requests: Sequence[Encoded]) -> torch.Tensor:
        return torch.sigmoid(program(*tensors(plain(bundle.model.schema, requests).batch())).float())

    return way
