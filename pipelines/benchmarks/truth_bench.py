"""``sluice bench truth``: what gates find of a truth that was planted, on worlds that need no data.

Every training has a world of its own: its seed decides the truth, the rows and the initial weights. A finished
training is kept under the work directory and read back, so a run that broke off goes on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ctr_models.errors import ConfigError, nearest
from pipelines.benchmarks.report import AtLeast, AtMost, BenchReport, JsonPath, progress
from pipelines.wording import counted

if TYPE_CHECKING:
    from pipelines.benchmarks.truth_parts import Figures, Part

Found = dict[str, list["Figures"]]
"""Of each arm, the figures of its trainings, one a seed."""
OWN = {"optfs": "annealed"}
"""The arm whose figures carry the part's plain names, as ``optfs_recall``; those of others end with the arm's."""


def main(
    only: Annotated[str, typer.Option(help="Comma-separated parts: optfs, orders, experts, shortcuts.")] = "",
    seeds: Annotated[int, typer.Option(min=1, help="Worlds of each arm; from 2 on there are intervals.")] = 3,
    first_seed: Annotated[int, typer.Option(min=0, help="Seed of the first world.")] = 2026,
    rows: Annotated[int | None, typer.Option(min=1000, help="Rows of each world; each part has its own.")] = None,
    workdir: Annotated[Path, typer.Option(help="Encoded features and finished trainings.")] = Path("runs/truth"),
    plots: Annotated[Path | None, typer.Option(help="Write one SVG a part into this folder.")] = None,
    json_path: JsonPath = None,
    at_least: AtLeast = None,
    at_most: AtMost = None,
) -> None:
    """Plant useless values, orders, populations and shortcuts, and see which gates find them.

    Example: sluice bench truth --only orders --at-least told_orders=0.9
    """
    from rich.console import Console

    from pipelines.benchmarks.truth_parts import PARTS

    wanted = [name.strip() for name in only.split(",") if name.strip()] or list(PARTS)
    for name in wanted:
        if name not in PARTS:
            raise ConfigError(f"no part {name!r}", where="--only", remedy=nearest(name, PARTS))
    talk = Console(stderr=True)
    report = BenchReport(
        f"planted truth, {counted(seeds, 'world')} each",
        ["part", "arm", "figure", "mean", "from", "to", "of each world"],
    )
    found: dict[str, Found] = {}
    with progress(talk, sum(len(PARTS[name].arms) for name in wanted) * seeds) as step:
        for name in wanted:
            found[name] = {arm: [] for arm in PARTS[name].arms}
            for arm in PARTS[name].arms:
                for seed in range(first_seed, first_seed + seeds):
                    step(f"{name}, {arm}, seed {seed}")
                    found[name][arm].append(_figures(PARTS[name], name, arm, seed, rows, workdir))
            _tell(report, name, PARTS[name], found[name])
    if plots is not None:
        from pipelines.benchmarks.truth_plots import PLOTS
        from pipelines.evaluation.plots import svg

        plots.mkdir(parents=True, exist_ok=True)
        for name in wanted:
            # A file of its own has no page whose colours its text would go with.
            picture = svg(PLOTS[name](found[name])).replace("<svg", '<svg style="background: white"', 1)
            (plots / f"known-truth-{name}.svg").write_text(picture + "\n", encoding="utf-8")
    report.note("from, to: 95 % interval over worlds and trainings (Student's t)")
    report.finish(json_path, at_least, at_most)


def _figures(part: Part, name: str, arm: str, seed: int, rows: int | None, workdir: Path) -> Figures:
    """Train one arm in one world and measure what it has found, or read back what was measured."""
    from pipelines.datasets.base import open_data
    from pipelines.experiments.trial import identity
    from pipelines.features.files import atomic_write
    from pipelines.features.prepare import prepare
    from pipelines.training.trainer import train
    from pipelines.training.truth import best_possible

    config = part.config(arm, seed, rows)
    data = prepare(open_data(config.data), None, workdir=workdir, seed=seed, progress=False)
    own = workdir / name / arm / f"seed-{seed}-{identity(config, data)}"
    kept = own / "figures.json"
    if not kept.exists():
        run_dir = own / "training"
        trained = train(config, data, run_dir=run_dir, resume=run_dir.exists(), progress=False)
        figures = {**part.measure(config, data, trained), "best_possible_auc": best_possible(data, "test")["auc"]}
        atomic_write(kept, json.dumps(figures, indent=1))
    return json.loads(kept.read_text(encoding="utf-8"))


def _tell(report: BenchReport, name: str, part: Part, found: Found) -> None:
    """Put the means and intervals of one part into the report."""
    control = next(iter(part.arms))
    for arm, trainings in found.items():
        series = {key: [figures[key] for figures in trainings] for key in trainings[0]}
        if arm != control:
            for key in part.paired:
                pairs = zip(series[key], found[control], strict=True)
                series[f"{key}_gain"] = [value - figures[key] for value, figures in pairs]
        for key, values in series.items():
            _add(report, name, arm, key, values, shown=not part.shown or key in part.shown)
    if name == "orders":  # all orders together
        told = [figures["told"] for trainings in found.values() for figures in trainings]
        report.figures["told_orders"] = sum(told) / len(told)
        report.figures["opening_margin"] = min(
            figures["opening"] - figures["absent"] for trainings in found.values() for figures in trainings
        )


def _add(report: BenchReport, name: str, arm: str, key: str, values: Sequence[float], *, shown: bool) -> None:
    from pipelines.benchmarks.truth_measures import interval

    over = interval(values)
    own = OWN.get(name) == arm
    figure = f"{name}_{key}" if own else f"{name}_{key}_{arm}"
    report.figures |= {figure: over.mean, f"{figure}_low": over.low, f"{figure}_high": over.high}
    if shown:
        worlds = ", ".join(f"{value:.3f}" for value in values)
        report.row(name, arm, key, *(f"{x:.4f}" for x in (over.mean, over.low, over.high)), worlds)
