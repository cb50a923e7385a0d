"""``sluice train``: raw logs in, a tracked and registered model out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipelines.commands.options import Config, Override
from pipelines.commands.result import Json, write_json

if TYPE_CHECKING:
    from rich.table import Table

    from pipelines.config import RunConfig
    from pipelines.datasets.base import RawData
    from pipelines.features.prepare import EncodedData
    from pipelines.training.distributed import Ranks
    from pipelines.training.trainer import TrainResult

GOLDEN_ROWS = 64
SHOWN = (("auc", "AUC"), ("logloss", "logloss"), ("gauc", "GAUC"), ("ne", "NE"), ("ece", "ECE"))
RANKED = tuple((f"{name}_{cut}", f"{name.upper()}@{cut}") for name in ("hr", "ndcg") for cut in (5, 10, 20))
"""Metrics and their titles, of clicks and of full ranking."""

EPILOG = """
Examples:

sluice train -c ctr.yaml

sluice train -c ctr.yaml -o model.name=gdcn -o train.epochs=3 --json result.json

sluice train --resume runs/runs/finalmlp-20260102-030405

sluice train -c ctr.yaml --run 2026-01-10

torchrun --nproc-per-node 2 -m pipelines.cli train -c ctr.yaml -o train.sharding.kind=row_wise
"""


def register(app: typer.Typer) -> None:
    """Add ``sluice train``."""
    app.command("train", epilog=EPILOG)(train_command)


def train_command(
    config: Config = None,
    override: Override = None,
    resume: Annotated[
        Path | None, typer.Option("--resume", help="Folder of a run that was broken off; it goes on from there.")
    ] = None,
    run: Annotated[
        str | None,
        typer.Option(
            "--run",
            help="Name of the run, for jobs that may be repeated: a run of that name that was broken off goes on, "
            "a finished one is not trained or registered again.",
        ),
    ] = None,
    json: Json = None,
) -> None:
    """Train a model: features, training, test metrics, a bundle, a registered version."""
    from ctr_models.errors import ConfigError
    from pipelines.config import load_config
    from pipelines.training.distributed import ranks
    from pipelines.training.trainer import train

    folder = None
    if resume is not None and run is not None:
        raise ConfigError("give one of --resume and --run", where="sluice train")
    if resume is not None:
        folder = _run_folder(resume)
        config = config or folder / "config.yaml"
    checked = load_config(config, override or ())
    if run is not None:
        folder = _named_folder(checked, run)
    with ranks() as me:
        raw, data = _prepare(checked, me)
        folder = me.share(folder or _new_folder(checked))
        # Rank 0 decides: it writes the file while the others still look.
        going_on = me.share((folder / "config.yaml").is_file())
        result = train(checked, data, run_dir=folder, resume=going_on, progress=me.first)
        if raw is not None:
            report = _release(checked, raw, result, once=going_on or run is not None)
            _show(checked, data, result, report, json)
        me.wait()


def _prepare(config: RunConfig, me: Ranks) -> tuple[RawData | None, EncodedData]:
    """Open the source and encode it on rank 0 alone, since opening may write it; open what came of it on all.

    An error of rank 0 ends every rank with the same message.

    Returns:
        The source, on rank 0 only, and the encoded features.
    """
    from ctr_models.errors import SluiceError
    from pipelines.datasets.base import open_data
    from pipelines.features.prepare import EncodedData, prepare

    raw: RawData | None = None
    outcome: Any = None
    if me.first:
        try:
            raw = open_data(config.data)
            outcome = prepare(raw, config.features, workdir=config.workdir, seed=config.seed).path
        except SluiceError as error:
            outcome = error
    outcome = me.share(outcome)
    if isinstance(outcome, SluiceError):
        raise outcome
    return raw, EncodedData.open(outcome)


def _run_folder(resume: Path) -> Path:
    from ctr_models.errors import ArtifactError

    if not (resume / "config.yaml").is_file():
        raise ArtifactError(
            "no run to resume here", where=str(resume), remedy="give the folder of a run, which holds config.yaml"
        )
    return resume


def _named_folder(config: RunConfig, name: str) -> Path:
    import re

    from ctr_models.errors import ConfigError
    from pipelines.config import dump_config

    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise ConfigError(f"{name!r} can't name a folder", where="--run", remedy="use letters, digits, - _ .")
    folder = config.workdir / "runs" / name
    made = folder / "config.yaml"
    if made.is_file() and made.read_text(encoding="utf-8") != dump_config(config):
        raise ConfigError("the run was made with other settings", where=str(folder), remedy="give another --run")
    return folder


def _new_folder(config: RunConfig) -> Path:
    from datetime import UTC, datetime

    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    folder = config.workdir / "runs" / f"{config.model.name}-{stamp}"
    number = 2
    while folder.exists():
        folder, number = folder.with_name(f"{config.model.name}-{stamp}-{number}"), number + 1
    return folder


def _release(config: RunConfig, raw: RawData, result: TrainResult, *, once: bool) -> dict[str, Any]:
    """Make the bundle and, with tracking, register it; ``once``: unless that has been done already."""
    from pipelines.config import plain_config
    from pipelines.release.bundle import Bundle
    from pipelines.release.golden import golden_rows
    from pipelines.release.sample import sampled

    test = raw.parts.get("test") or raw.parts["all"]
    bundle, schema = result.run_dir / "bundle", result.data.state.schema()
    if not (once and bundle.exists()):
        Bundle.create(
            bundle,
            model=result.model,
            state=result.data.state,
            config=plain_config(config.public()),
            metrics=result.metrics,
            golden=golden_rows(test.frame, result.data.state.spec, rows=GOLDEN_ROWS),
            seen=sampled(result.data.files("train"), schema),
            unseen=sampled(result.data.files("valid"), schema),
        )
    version = None
    if config.tracking.enabled:
        from pipelines.release.registry import of_run
        from pipelines.release.registry import register as register_bundle
        from pipelines.training.tracking import gate_hash, tracking_uri

        uri = tracking_uri(config)
        earlier = of_run(config.name, result.run_dir.name, uri) if once else None
        version = (
            earlier.version
            if earlier
            else register_bundle(
                bundle,
                config.name,
                uri,
                result.mlflow_run_id,
                {"gate_hash": gate_hash(config), "run": result.run_dir.name, "run_dir": str(result.run_dir)},
            )
        )
    return {"bundle": str(bundle), "version": version}


def _show(
    config: RunConfig, data: EncodedData, result: TrainResult, report: dict[str, Any], json: str | None
) -> None:
    from rich.console import Console
    from rich.table import Table

    from pipelines.training.truth import best_possible

    best = {f"{split}_{k}": v for split in ("valid", "test") for k, v in best_possible(data, split).items()}
    console = Console(stderr=json == "-")
    table = Table(
        title=f"{config.name}: {config.model.name}, best epoch {_best_epoch(result)}", title_justify="left"
    )
    for column in ("metric", "valid", "test"):
        table.add_column(column, justify="left" if column == "metric" else "right")
    if best:
        table.add_column("best possible on test", justify="right")
    for task in ("", *result.model.tasks):
        for name, title in RANKED if "test_ndcg_10" in result.metrics else SHOWN:
            if task:
                name, title = f"{name}_{task}", f"{title}, {task}"
            cells = [_number(result.metrics.get(f"{split}_{name}")) for split in ("valid", "test")]
            table.add_row(title, *cells, *([_number(best.get(f"test_{name}"))] if best else []))
    console.print(table)
    for told in result.reports:
        console.print(_report_table(told))
    for column, slices in result.slices.items():
        console.print(_slice_table(column, slices))
    lines = [f"{result.rows_per_second:,.0f} training rows/s", f"run: {result.run_dir}"]
    if report["version"] is not None:
        lines.append(f"registered: models:/{config.name}/{report['version']}")
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
    write_json(
        json,
        {
            "metrics": result.metrics,
            "best_possible": best,
            "slices": result.slices,
            "reports": result.reports,
            "rows_per_second": result.rows_per_second,
            "epochs": len(result.history),
            "run_dir": str(result.run_dir),
            "mlflow_run_id": result.mlflow_run_id,
            "name": config.name,
            **report,
        },
    )


def _report_table(told: dict[str, Any]) -> Table:
    from rich.table import Table

    table = Table(title=told["title"], title_justify="left")
    for name in told["rows"][0]:
        table.add_column(name, justify="left" if isinstance(told["rows"][0][name], str) else "right")
    for row in told["rows"]:
        table.add_row(*(_cell(value) for value in row.values()))
    return table


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _slice_table(column: str, slices: list[dict[str, Any]]) -> Table:
    from rich.table import Table

    table = Table(title=f"test rows by {column}", title_justify="left")
    for name in (column, "rows", "AUC", "logloss", "ECE"):
        table.add_column(name, justify="left" if name == column else "right")
    for one in slices:
        cells = [_number(one.get(name)) for name in ("auc", "logloss", "ece")]
        table.add_row("(missing)" if one["value"] is None else str(one["value"]), f"{one['rows']:,}", *cells)
    return table


def _best_epoch(result: TrainResult) -> int:
    return next(r["epoch"] for r in reversed(result.history) if r["best"])


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.5f}"
