"""``sluice models``, ``sluice promote`` and ``sluice score``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipelines.commands.options import TrackingUri
from pipelines.commands.result import Json, write_json

if TYPE_CHECKING:
    from rich.console import Console

    from pipelines.release.promotion import Decision
    from pipelines.release.registry import Release


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command(
        "models",
        epilog="Examples:\n\nsluice models\n\nsluice models clicks --json -",
    )(models)
    app.command(
        "promote",
        epilog="Examples:\n\n"
        "sluice promote clicks --version 3\n\n"
        "sluice promote clicks --version 3 --min-auc 0.70 --max-logloss-increase 0.001 --dry-run\n\n"
        "sluice promote clicks --run 2026-01-10 --max-auc-drop 0.002\n\n"
        "sluice promote clicks --rollback",
    )(promote)
    app.command(
        "score",
        epilog="Examples:\n\n"
        "sluice score -m models:/clicks@champion --data today.parquet --out scores.parquet\n\n"
        "sluice score -m runs/clicks/bundle --data today.csv --out scores.csv",
    )(score)


def models(
    name: Annotated[str | None, typer.Argument(help="A registered model; all of them without it.")] = None,
    tracking_uri: TrackingUri = None,
    json: Json = None,
) -> None:
    """List registered versions with their aliases, metrics and gates."""
    from dataclasses import asdict
    from datetime import UTC, datetime

    from rich.table import Table

    from pipelines.release.registry import model_names, releases

    names = [name] if name else model_names(tracking_uri)
    found = [release for one in names for release in releases(one, tracking_uri)]
    screen = _screen(json)
    if not found:
        screen.print("no registered model yet; sluice train registers one")
    else:
        table = Table(box=None, header_style="bold", pad_edge=False)
        for column in ("name", "version", "aliases", "model"):
            table.add_column(column)
        for column in ("AUC", "logloss", "registered"):
            table.add_column(column, justify="right")
        for r in found:
            table.add_row(
                r.name,
                str(r.version),
                " ".join(f"[bold green]{a}[/]" for a in r.aliases),
                _architecture(r),
                _figure(r.metrics, "auc"),
                _figure(r.metrics, "logloss"),
                datetime.fromtimestamp(r.created / 1000, UTC).strftime("%Y-%m-%d %H:%M"),
            )
        screen.print(table)
    write_json(json, [{**asdict(r), "uri": r.uri} for r in found])


def promote(
    name: Annotated[str, typer.Argument(help="The registered model.")],
    version: Annotated[str | None, typer.Option("--version", "-v", help="A version, or an alias of one.")] = None,
    run: Annotated[
        str | None, typer.Option("--run", help="The version that the run of this name registered.")
    ] = None,
    to: Annotated[str, typer.Option(help="The alias to move.")] = "champion",
    min_auc: Annotated[float | None, typer.Option(help="Refuse below this AUC.")] = None,
    max_auc_drop: Annotated[
        float | None, typer.Option(help="Refuse if AUC falls by more than this against the current holder.")
    ] = None,
    max_logloss_increase: Annotated[
        float | None, typer.Option(help="Refuse if logloss rises by more than this against the current holder.")
    ] = None,
    rollback: Annotated[bool, typer.Option("--rollback", help="Go back to what the alias meant before.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Decide, but move nothing.")] = False,
    tracking_uri: TrackingUri = None,
    json: Json = None,
) -> None:
    """Let an alias mean a version, if it reaches the bars; exit code 1 if it does not.

    What the alias meant before stays under the alias "previous" ("previous-x" for an alias x but champion).
    """
    from ctr_models.errors import ArtifactError, ConfigError
    from pipelines.release import promotion
    from pipelines.release.registry import of_run

    if sum((rollback, version is not None, run is not None)) != 1:
        raise ConfigError("give one of --version, --run and --rollback", where="sluice promote")
    if run is not None:
        found = of_run(name, run, tracking_uri)
        if found is None:
            raise ArtifactError(f"no version of run {run!r}", where=name, remedy="sluice models lists them")
        version = str(found.version)
    if version is not None:
        bars = promotion.Bars(min_auc, max_auc_drop, max_logloss_increase)
        decision = promotion.promote(name, version, to, bars=bars, dry_run=dry_run, tracking_uri=tracking_uri)
    else:
        decision = promotion.rollback(name, to, dry_run=dry_run, tracking_uri=tracking_uri)
    _tell(_screen(json), decision)
    write_json(json, decision.to_dict())
    if not decision.allowed:
        raise typer.Exit(1)


def score(
    model: Annotated[
        str, typer.Option("-m", "--model", help="models:/name@alias, models:/name/version, or a bundle's path.")
    ],
    data: Annotated[Path, typer.Option("--data", help="Raw rows: .parquet, or .csv with a header.")],
    out: Annotated[Path, typer.Option("--out", help="Where the scores go: .parquet or .csv.")],
    tracking_uri: TrackingUri = None,
    json: Json = None,
) -> None:
    """Score the rows of a file; prints AUC and logloss if it holds the label."""
    import time

    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from pipelines.release.bundle import Bundle
    from pipelines.release.registry import resolve
    from pipelines.release.score import file_rows, score_file

    bundle = Bundle.load(resolve(model, tracking_uri))
    begin = time.perf_counter()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f} rows  {task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("scoring", total=file_rows(data), rate="")

        def advance(rows: int) -> None:
            speed = (progress.tasks[0].completed + rows) / (time.perf_counter() - begin)
            progress.update(task, advance=rows, rate=f"{speed:,.0f} rows/s")

        done = score_file(bundle, data, out, on_chunk=advance)
    seconds = time.perf_counter() - begin
    screen = _screen(json)
    screen.print(f"{done.rows:,} rows in {seconds:.1f} s, {done.rows / seconds:,.0f} rows/s: {out}", soft_wrap=True)
    if done.metrics:
        screen.print("  ".join(f"{name} {done.metrics[name]:.5f}" for name in ("auc", "logloss", "ece")))
    result = {"rows": done.rows, "rows_per_second": done.rows / seconds, "out": str(out), "metrics": done.metrics}
    write_json(json, {**result, "bundle": bundle.hash})


def _tell(screen: Console, decision: Decision) -> None:
    was = f" (was version {decision.was})" if decision.was is not None else ""
    what = f"{decision.name} version {decision.version}"
    if not decision.allowed:
        screen.print(f"[bold red]refused:[/] {what} is not made {decision.alias}{was}", soft_wrap=True)
        for reason in decision.reasons:
            screen.print(f"  {reason}", soft_wrap=True, highlight=False)
    elif decision.dry_run:
        screen.print(f"{what} would become {decision.alias}{was}; nothing was moved", soft_wrap=True)
    elif decision.was == decision.version:
        screen.print(f"{what} is {decision.alias} already", soft_wrap=True)
    else:
        screen.print(f"{what} is now [bold green]{decision.alias}[/]{was}", soft_wrap=True)


def _architecture(release: Release) -> str:
    """The model, with the gates that do something."""
    gates = {slot: gate.partition(":")[0] for slot, gate in release.gates.items()}
    return ", ".join([release.model, *(f"{slot} {gate}" for slot, gate in gates.items() if gate != "none")])


def _figure(metrics: Any, kind: str) -> str:
    value = metrics.get(f"test_{kind}", metrics.get(f"valid_{kind}", metrics.get(kind)))
    return "" if value is None else f"{value:.5f}"


def _screen(json: str | None) -> Console:
    from rich.console import Console

    return Console(stderr=json == "-", highlight=False)
