"""``sluice events``: what live traffic left, as training data."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from pipelines.commands.result import Json, write_json
from serving import EMBEDDED

Url = Annotated[str, typer.Option("--events", help="Database: sqlite:///file.db or postgresql://user@host/name.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    commands = typer.Typer(
        name="events",
        no_args_is_help=True,
        help="Exposures and events of live traffic.",
        epilog="Examples:\n\nsluice events export --out runs/logs\n\n"
        "sluice events export --events postgresql://sluice@db/events --day 2026-11-20 --window-hours 6 --json -",
    )
    commands.callback()(lambda: None)
    commands.command("export")(export)
    app.add_typer(commands)


def export(
    events: Url = EMBEDDED,
    out: Annotated[Path, typer.Option("--out", help="Folder of the partitions, one a day.")] = Path("runs/logs"),
    day: Annotated[
        list[datetime] | None,
        typer.Option(formats=["%Y-%m-%d"], help="A day in UTC; repeatable. [default: all not yet final]"),
    ] = None,
    window_hours: Annotated[
        float, typer.Option(min=0.01, max=24 * 90, help="Events count so long after the exposure.")
    ] = 24.0,
    label: Annotated[str, typer.Option(help="Name of the label's column.")] = "click",
    timestamp: Annotated[str, typer.Option(help="Name of the column of the exposure's time.")] = "time",
    again: Annotated[bool, typer.Option("--again", help="Write final days anew, too.")] = False,
    json: Json = None,
) -> None:
    """Write Parquet of what was shown, with what came of it: the training set of the next day.

    A row is a candidate that was shown. Its events are those that name its request, or the last touch of its user
    and item, within the window. A day's partition appears whole, takes the place of its earlier version, and is
    final once no event can count any more. Read it with data.source=parquet data.path='runs/logs/day=*/*.parquet'.

    Example: sluice events export --out runs/logs --window-hours 6
    """
    from datetime import timedelta

    from rich.console import Console
    from rich.table import Table

    from serving import export as module
    from serving.database import Database

    screen = Console(stderr=True, highlight=False)
    database = Database(events)
    try:
        written = module.export(
            database,
            out,
            days=None if day is None else [one.date() for one in day],
            window=timedelta(hours=window_hours),
            label=label,
            timestamp=timestamp,
            again=again,
            shown=True,
        )
    finally:
        database.close()
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("day", "requests", "rows", "clicks", "conversions", "skips", "unmatched", ""):
        table.add_column(name, justify="left" if name in ("day", "") else "right")
    for one in written:
        figures = (one.exposures, one.rows, one.clicks, one.conversions, one.skips, one.unmatched)
        state = "final" if one.final else "events may still come"
        table.add_row(one.day, *(f"{figure:,}" for figure in figures), state)
    screen.print(table if written else "nothing new to write")
    write_json(json, {"out": out, "days": [vars(one) for one in written]})
