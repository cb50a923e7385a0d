"""``sluice bench gates``: every gate in every slot of several models, several seeds, held against the control.

A finished training is kept under the work directory and read back, so that a run that broke off goes on, and
several processes, each with its ``--part``, share one folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ctr_models.errors import ConfigError, nearest
from pipelines.benchmarks.report import AtLeast, AtMost, BenchReport, JsonPath
from pipelines.wording import counted

if TYPE_CHECKING:
    import polars as pl

    from pipelines.experiments.matrix import Job, Study


@dataclass(frozen=True)
class Budget:
    """What each cell of a model is trained with.

    Args:
        settings: published ones, ``<data set>/<model>``.
        overrides: what makes them affordable by the hundred.
        fraction: of the users whose rows are taken.
    """

    settings: str
    overrides: tuple[str, ...]
    fraction: float = 1.0


# The average looks back over one epoch of the fewer there are, not over four.
_FRAPPE = ("train.epochs=12", "train.averaging.decay=0.98")
# More and smaller steps make up for fewer rows; the contrast keeps its share of the batch.
_HISTORY = ("train.epochs=3", "train.batch_size=1024", "data.options.history=20", "data.options.skips=0")
BUDGETS = {
    "finalmlp": Budget("frappe_x1/finalmlp", _FRAPPE),
    "gdcn": Budget("frappe_x1/gdcn_p", _FRAPPE),
    # Without the perceptron AutoInt has learnt first-order effects only, after so few steps.
    "autoint": Budget(
        "frappe_x1/autoint_plus",
        ("train.epochs=6", "train.averaging.decay=0.98", "model.attention_layers=2", "model.width=32"),
    ),
    "din": Budget("movielens_1m_history/din", _HISTORY, 0.2),
    "aw_moe": Budget("movielens_1m_history/aw_moe", (*_HISTORY, "model.contrast.rows=256"), 0.2),
}


def main(
    data: Annotated[Path, typer.Option(help="Folder that holds frappe/ and movielens_1m/.")],
    models: Annotated[str, typer.Option(help=f"Comma-separated, of {', '.join(BUDGETS)}; all.")] = "",
    slots: Annotated[str, typer.Option(help="Comma-separated; all slots of each model.")] = "",
    gates: Annotated[
        str, typer.Option(help="Comma-separated names or dotted paths; all that fit. Controls stay.")
    ] = "",
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each cell.")] = 3,
    epochs: Annotated[int | None, typer.Option(min=1, help="Of each training, in place of the default.")] = None,
    fraction: Annotated[
        float | None, typer.Option(min=0.001, max=1, help="Share of the users, in place of the default.")
    ] = None,
    override: Annotated[
        list[str] | None, typer.Option("-o", "--override", help="key.sub=value of every training, repeatable.")
    ] = None,
    part: Annotated[
        str, typer.Option(help="2/3: train the second third only, beside two more processes.", metavar="K/N")
    ] = "1/1",
    train: Annotated[bool, typer.Option(help="--no-train reports what is finished.")] = True,
    workdir: Annotated[
        Path, typer.Option(help="Encoded features, finished trainings, cells.parquet and gates.parquet.")
    ] = Path("runs/gates"),
    page: Annotated[
        Path | None, typer.Option(help="Write a page with plots: a .html file, or a folder for it.")
    ] = None,
    markdown: Annotated[
        Path | None,
        typer.Option(
            help="Write the results into this file, between its results marks; plots into images/ beside."
        ),
    ] = None,
    json_path: JsonPath = None,
    at_least: AtLeast = None,
    at_most: AtMost = None,
) -> None:
    """Train models with every gate in each of their slots, and tell which differ from the control.

    Example: sluice bench gates --data data --models finalmlp,gdcn --slots field --page gates.html
    """
    import polars as pl
    from rich.console import Console

    from pipelines.experiments.matrix import dealt, differences, frame_of, summary
    from pipelines.features.files import atomic_write

    talk = Console(stderr=True)
    number, parts = _part(part)
    studies = [
        _study(name, data, workdir, _names(slots), _names(gates), seeds, epochs, fraction, override or ())
        for name in _known(_names(models) or list(BUDGETS), BUDGETS, "--models")
    ]
    jobs = [job for study in studies for job in study.jobs]
    if not jobs:
        raise ConfigError(
            "no gate fits these slots", where="--slots, --gates", remedy="sluice gates lists which gate fits where"
        )
    if train:
        _run(dealt(jobs, number, parts), talk)
    left = sum(not job.is_done and job.error is None for job in jobs)
    with talk.status("comparing"):
        frame = frame_of(studies)
        found = {study.name: differences(study) for study in studies}
        table = pl.concat([summary(s, frame, found[s.name]) for s in studies], how="diagonal_relaxed")
    for name, content in (("cells", frame), ("gates", table)):
        _write_parquet(workdir / f"{name}.parquet", content)
    notes = _notes(studies, left)
    if page is not None:
        from pipelines.experiments.matrix_report import render_page

        target = page if page.suffix == ".html" else page / "gates.html"
        atomic_write(target, render_page(table, notes=notes, about=_about(studies)))
        talk.print(f"page: {target}", highlight=False, soft_wrap=True)
    if markdown is not None:
        from pipelines.experiments.matrix_report import write_markdown

        write_markdown(markdown, table, notes=notes, about=_about(studies))
        talk.print(f"results: {markdown}", highlight=False, soft_wrap=True)
    report = _report(table, notes)
    report.figures |= {"trainings": float(len(jobs)), "left": float(left)}
    report.finish(json_path, at_least, at_most)


def _study(
    name: str,
    data: Path,
    workdir: Path,
    slots: Sequence[str],
    gates: Sequence[str],
    seeds: int,
    epochs: int | None,
    fraction: float | None,
    overrides: Sequence[str],
) -> Study:
    from ctr_models.gates.base import SLOTS
    from pipelines.benchmarks.accuracy_bench import settings
    from pipelines.datasets.base import open_data
    from pipelines.experiments.matrix import Study, cells_of, some_users
    from pipelines.features.prepare import prepare

    budget = BUDGETS[name]
    given = [*budget.overrides, *([f"train.epochs={epochs}"] if epochs else []), "train.threads=1", *overrides]
    config = settings(budget.settings, data, workdir, given)
    cells = cells_of(config.model, _known(slots, SLOTS, "--slots"), _registered(gates))
    raw = some_users(open_data(config.data), budget.fraction if fraction is None else fraction, config.seed)
    encoded = prepare(raw, config.features, workdir=workdir, seed=config.seed)
    own = tuple(range(config.seed, config.seed + seeds))
    return Study(name, config, encoded, tuple(cells), own, workdir / name)


def _run(jobs: Sequence[Job], talk: Any) -> None:
    """Train what is not finished, a line for each, with the time that the rest will take."""
    import time

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    todo = [job for job in jobs if not job.is_done]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    seconds: dict[str, list[float]] = {}
    with Progress(*columns, TextColumn("{task.fields[left]}"), console=talk, transient=True) as progress:
        task = progress.add_task("", total=len(jobs), completed=len(jobs) - len(todo), left="")
        for place, job in enumerate(todo):
            progress.update(task, description=str(job))
            begin = time.perf_counter()
            trial = job.run()
            if trial is not None:
                seconds.setdefault(job.study.name, []).append(time.perf_counter() - begin)
            left = remaining([j.study.name for j in todo[place + 1 :]], seconds)
            told = f"valid AUC {trial.metrics['valid_auc']:.5f}" if trial is not None else f"failed: {job.error}"
            progress.console.print(
                f"{job}: {told}, {time.perf_counter() - begin:.0f} s; {len(todo) - place - 1} left{left}",
                style="dim" if trial is not None else "red",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )
            progress.update(task, advance=1, left=left.removeprefix(", "))


def remaining(names: Sequence[str], seconds: dict[str, list[float]]) -> str:
    """Return how long trainings of these models will take by what earlier ones took; nothing while that is unknown.

    Example:
        >>> remaining(["gdcn", "gdcn", "din"], {"gdcn": [50.0, 70.0], "din": [120.0]})
        ', about 4 min'
    """
    known = [second for own in seconds.values() for second in own]
    if not known or not names:
        return ""
    usual = sum(known) / len(known)
    total = sum(sum(own) / len(own) if (own := seconds.get(name)) else usual for name in names)
    return f", about {total / 3600:.1f} h" if total >= 5400 else f", about {total / 60:.0f} min"


def _report(table: pl.DataFrame, notes: Sequence[str]) -> BenchReport:
    report = BenchReport(
        "Gate matrix",
        [
            *("model", "slot: gate", "test AUC", "difference", "\N{PLUS-MINUS SIGN}", "p", "verdict"),
            *("parameters", "FLOPs/row", "rows/s", "ms/1,000 rows"),
        ],
    )
    counts = dict.fromkeys(("better", "worse", "noise", "failed"), 0)
    for row in table.iter_rows(named=True):
        name = f"{row['model']}_{row['slot']}_{row['gate']}"
        verdict = "control" if row["gate"] == row["control"] else row.get("auc_verdict") or "not finished"
        if row["error"] is not None:
            verdict = f"failed: {row['error'][:60]}"
        counts["failed"] += row["error"] is not None
        if verdict in counts:
            counts[verdict] += 1
        value = row.get("auc_value")
        report.row(
            *(row["model"], f"{row['slot']}: {row['gate']}" + (" *" if row["chosen"] else "")),
            *(_number(row["test_auc"], ".5f"), _number(value, "+.5f")),
            *("", "") if value is None else (f"{row['auc_high'] - value:.5f}", f"{row['auc_p']:.4f}"),
            verdict,
            *(_number(row[key], ",.0f") for key in ("parameters", "flops_per_row", "rows_per_second")),
            _number(row["milliseconds"], ".2f"),
        )
        report.figures |= {f"auc_{name}": row["test_auc"]} if row["test_auc"] is not None else {}
        report.figures |= {f"difference_{name}": value} if value is not None else {}
    report.figures |= {name: float(count) for name, count in counts.items()}
    for note in notes:
        report.note(note)
    return report


def _notes(studies: Sequence[Study], left: int) -> list[str]:
    notes = [
        "Each row is the model as published, on a smaller budget, but for one gate. The epoch is chosen on the "
        "valid rows, and the test rows are read once. Differences are to the control in the same slot, paired on "
        f"the same test rows. Intervals count users and {counted(len(studies[0].seeds), 'seed')}, and are "
        "corrected for all gates of a model by Holm's rule: a verdict other than noise survives that.",
        "* is the cell that the valid rows would choose.",
    ]
    return [*notes, f"{left} trainings are not finished and stand out here."] if left else notes


def _about(studies: Sequence[Study]) -> dict[str, str]:
    """What each model was trained on and how."""
    return {
        s.name: f"{BUDGETS[s.name].settings}: {s.data.rows('train'):,} training, {s.data.rows('valid'):,} valid, "
        f"{s.data.rows('test'):,} test rows; {s.config.train.epochs} epochs at most, in batches of "
        f"{s.config.train.batch_size:,}; {counted(len(s.seeds), 'seed')}, {counted(len(s.jobs), 'training')}"
        for s in studies
    }


def _part(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    if not (part.isdigit() and parts.isdigit() and 1 <= int(part) <= int(parts)):
        raise ConfigError(f"{text!r} is no part", where="--part", remedy="write 1/2 and, beside it, 2/2")
    return int(part), int(parts)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _known(names: Sequence[str], known: Any, where: str) -> Sequence[str]:
    for name in names:
        if name not in known:
            raise ConfigError(f"no {name!r}", where=where, remedy=nearest(name, known))
    return names


def _registered(names: Sequence[str]) -> list[str]:
    """Return the names of gates, sorted; one given by its dotted path is imported."""
    from ctr_models.gates.base import GATES

    try:
        return sorted({name if name in GATES else GATES[name].name or name for name in names})
    except ConfigError as error:
        raise ConfigError(error.problem, where="--gates", remedy=error.remedy) from None


def _number(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def _write_parquet(path: Path, frame: pl.DataFrame) -> None:
    import io

    from pipelines.features.files import atomic_write

    buffer = io.BytesIO()
    frame.write_parquet(buffer)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, buffer.getvalue())
