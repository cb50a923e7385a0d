"""``sluice init``, ``sluice features`` and ``sluice data``: from a log to encoded features."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipelines.commands.options import Config, Override
from pipelines.commands.result import Json, write_json

if TYPE_CHECKING:
    from pipelines.features.guess import Proposal
    from pipelines.features.prepare import EncodedData


def register(app: typer.Typer) -> None:
    """Add ``sluice init``, ``sluice features`` and ``sluice data``."""
    app.command("init", epilog="Example: sluice init --data clicks.parquet --out ctr.yaml")(init)
    app.command(
        "features", epilog="Example: sluice features -c ctr.yaml -o data.path=clicks-2026-01.parquet --json -"
    )(features)
    group = typer.Typer(no_args_is_help=True, help="Make data.")
    group.callback()(_data)
    group.command(
        "world",
        epilog="Examples:\n\nsluice data world --out world --rows 400000\n\n"
        "sluice data world --out world --days 30 --day 2026-01-05",
    )(world)
    app.add_typer(group, name="data")


def _data() -> None:
    """Make data."""


def init(
    data: Annotated[Path, typer.Option("--data", help="A Parquet or CSV log: a file, a folder or a pattern.")],
    out: Annotated[Path, typer.Option("--out", help="Where to write the configuration.")] = Path("ctr.yaml"),
    name: Annotated[str | None, typer.Option(help="Name of the experiment and of the registered model.")] = None,
    label: Annotated[str | None, typer.Option(help="The column of clicks, 0 or 1.")] = None,
    user: Annotated[str | None, typer.Option(help="The column of users.")] = None,
    item: Annotated[str | None, typer.Option(help="The column of items.")] = None,
    time: Annotated[str | None, typer.Option(help="The column of times.")] = None,
    sample: Annotated[int, typer.Option(min=100, help="Rows to look at.")] = 100_000,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    json_path: Json = None,
) -> None:
    """Look at a log and write a commented ctr.yaml: label, user, item, time and every column's kind guessed."""
    import yaml

    from ctr_models.errors import ConfigError
    from pipelines.config import parse_config
    from pipelines.features.files import atomic_write
    from pipelines.features.guess import guess
    from pipelines.features.starter import to_yaml

    if out.exists() and not force:
        raise ConfigError("is there already", where=str(out), remedy="give another --out, or --force to replace it")
    proposal = guess(data, label=label, user=user, item=item, time=time, sample=sample)
    text = to_yaml(proposal, name=name)
    parse_config(yaml.safe_load(text), str(out))
    atomic_write(out, text)
    if json_path != "-":
        _show_proposal(proposal, out)
    write_json(json_path, {"config": str(out), **_proposal_json(proposal)})


def features(config: Config = None, override: Override = None, json_path: Json = None) -> None:
    """Validate, fit and encode the data of a configuration; an earlier result for the same bytes is reused."""
    import time

    from pipelines.config import load_config
    from pipelines.datasets.base import open_data
    from pipelines.features.prepare import prepare

    run = load_config(config, override or ())
    started = time.perf_counter()
    raw = open_data(run.data)
    encoded = prepare(raw, run.features, workdir=run.workdir, seed=run.seed, progress=json_path != "-")
    seconds = time.perf_counter() - started
    report = _features_json(encoded, seconds)
    if json_path != "-":
        _show_features(report)
    write_json(json_path, report)


def world(
    out: Annotated[Path, typer.Option("--out", help="The folder; one Parquet file a day is written into it.")],
    rows: Annotated[int, typer.Option(min=1, help="Rows, all days together.")] = 400_000,
    users: Annotated[int, typer.Option(min=10, help="Who see something.")] = 2_000,
    items: Annotated[int, typer.Option(min=20, help="That are shown.")] = 600,
    days: Annotated[int, typer.Option(min=1, help="Days from 2026-01-01 on.")] = 14,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same bytes.")] = 2026,
    strength: Annotated[float, typer.Option(min=0, help="How much there is to learn.")] = 1.0,
    drift: Annotated[float, typer.Option(min=0, help="How fast tastes turn.")] = 1.0,
    conversion_rate: Annotated[
        float | None, typer.Option(help="Of the clicks: adds a column conversion, null without a click.")
    ] = None,
    day: Annotated[
        datetime | None, typer.Option(formats=["%Y-%m-%d"], help="Write this day only, as a log grows.")
    ] = None,
    json_path: Json = None,
) -> None:
    """Write a click world: a simulated log in which the true probability of every click is known."""
    import polars as pl

    from pipelines.datasets import click_world as cw
    from pipelines.datasets.base import check_options
    from pipelines.datasets.config import DataConfig

    given = {
        "rows": rows,
        "users": users,
        "items": items,
        "days": days,
        "seed": seed,
        "strength": strength,
        "drift": drift,
        **({"conversion_rate": conversion_rate} if conversion_rate is not None else {}),
    }
    options = check_options(DataConfig(source="click_world", options=given))
    assert isinstance(options, cw.ClickWorldOptions)
    if day is not None:
        files = [cw.write_day(options, out, (day.date() - cw.FIRST_DAY).days)]
    else:
        with _progress("writing", rows, shown=json_path != "-") as advance:
            files = cw.write_world(options, out, on_day=advance)
    frame = pl.concat([pl.read_parquet(file, columns=["click", cw.TRUTH]) for file in files])
    best = cw.best_possible(frame)
    report = {
        "folder": str(out),
        "files": [str(file) for file in files],
        "rows": len(frame),
        "click_rate": float(frame["click"].to_numpy().mean()),
        "best_auc": best["auc"],
        "best_logloss": best["logloss"],
    }
    if json_path != "-":
        typer.echo(
            f"{report['rows']:,} rows in {len(files)} files under {out}: click rate {report['click_rate']:.3f}, "
            f"best possible AUC {best['auc']:.4f}, logloss {best['logloss']:.4f}"
        )
    write_json(json_path, report)


def _proposal_json(proposal: Proposal) -> dict[str, Any]:
    spec = proposal.spec
    return {
        "source": proposal.source.name,
        "rows": proposal.source.rows,
        "sample": proposal.sample,
        "label": spec.label,
        "user": spec.user,
        "item": spec.item,
        "timestamp": spec.timestamp,
        "columns": [
            {
                "name": g.name,
                "use": g.use,
                "kind": g.column.kind if g.column else None,
                "encode": g.column.encoding.how if g.column else None,
                "role": g.column.role if g.column else None,
                "distinct": g.distinct,
                "missing": g.missing,
                "why": g.why,
            }
            for g in proposal.guesses
        ],
    }


def _show_proposal(proposal: Proposal, out: Path) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=str(proposal.source.path), title_justify="left")
    for heading in ("column", "use", "kind", "encoding", "distinct", "missing"):
        table.add_column(heading, justify="right" if heading in ("distinct", "missing") else "left")
    for g in proposal.guesses:
        c = g.column
        cells = (
            g.name,
            f"{c.role} feature" if c and g.use == "feature" else g.use,
            c.kind if c else "",
            c.encoding.how if c and c.table is None else f"as {c.table}" if c else "",
            f"{g.distinct:,}" if g.distinct else "",
            f"{g.missing:.1%}" if g.missing else "",
        )
        table.add_row(*map(Text, cells), style="dim" if g.use == "left out" else None)
    console = Console()
    console.print(table)
    # The next command is to be copied: it must not be wrapped.
    console.print(
        Text(f"wrote {out}; each guess is explained there. Next: sluice features -c {out}"), soft_wrap=True
    )


def _features_json(encoded: EncodedData, seconds: float) -> dict[str, Any]:
    """Everything the table shows; shares are of the valid part's values."""
    import polars as pl

    rows = {split: encoded.rows(split) for split in ("train", "valid", "test")}
    schema = encoded.schema
    ids = (*schema.sparse, *schema.sequences)
    values = {f.name: pl.col(f.name).explode() if f.kind != "categorical" else pl.col(f.name) for f in ids}
    shares = (
        encoded.frame("valid")
        .select(
            *(value.eq(0).mean().alias(f"missing:{name}") for name, value in values.items()),
            *(value.eq(1).mean().alias(f"unknown:{name}") for name, value in values.items()),
        )
        .collect()
        .row(0, named=True)
    )
    fields: list[dict[str, Any]] = [
        {"name": f.name, "kind": "float", "role": f.role, "dim": f.dim} for f in schema.dense
    ]
    fields += [
        {
            "name": f.name,
            "kind": "cross" if f.of else f.kind,
            "role": f.role,
            "dim": f.dim,
            "table": f.table,
            "table_rows": f.rows,
            "missing": shares[f"missing:{f.name}"] or 0.0,
            "unknown": shares[f"unknown:{f.name}"] or 0.0,
        }
        for f in ids
    ]
    total = sum(rows.values())
    return {
        "path": str(encoded.path),
        "hash": encoded.state.hash,
        "rows": rows,
        "seconds": seconds,
        "rows_per_second": total / seconds,
        "fields": fields,
    }


def _show_features(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for heading in ("field", "kind", "role", "dim", "shares", "rows", "missing", "unknown"):
        table.add_column(heading, justify="right" if heading in ("dim", "rows", "missing", "unknown") else "left")
    for f in report["fields"]:
        cells = [f["name"], f["kind"], f["role"], str(f["dim"])]
        if "table" in f:
            shared = f["table"] if f["table"] != f["name"] else ""
            cells += [shared, f"{f['table_rows']:,}", f"{f['missing']:.2%}", f"{f['unknown']:.2%}"]
        table.add_row(*map(Text, cells))
    console = Console()
    console.print(table)
    parts = ", ".join(f"{count:,} {split}" for split, count in report["rows"].items())
    console.print(
        Text(
            f"{parts}; {report['seconds']:.1f} s, {report['rows_per_second']:,.0f} rows/s; missing and unknown are "
            f"shares of the values in valid\n{report['path']}"
        ),
        soft_wrap=True,
    )


@contextmanager
def _progress(what: str, rows: int, *, shown: bool) -> Iterator[Callable[[int], None]]:
    """A bar on stderr with rate and remaining time; yields what to call with the rows just done."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(show_speed=True),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not shown,
        transient=True,
    ) as progress:
        task = progress.add_task(what, total=rows)
        yield lambda done: progress.advance(task, done)
