"""``sluice events``: what live traffic left, as training data; and for how long the database keeps it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipelines.commands.result import Json, write_json
from serving import EMBEDDED

if TYPE_CHECKING:
    from serving.database import Database

Url = Annotated[str, typer.Option("--events", help="Database: sqlite:///file.db or postgresql://user@host/name.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    commands = typer.Typer(
        name="events",
        no_args_is_help=True,
        help="Exposures and events of live traffic.",
        epilog="Examples:\n\nsluice events export --out runs/logs\n\n"
        "sluice events export --events postgresql://sluice@db/events --day 2026-11-20 --window-hours 6 --json -\n\n"
        "sluice events prune --older-than 90d --dry-run",
    )
    commands.command("export")(export)
    commands.command(
        "prune",
        epilog="Examples:\n\nsluice events prune --older-than 90d --dry-run\n\n"
        "sluice events prune --older-than 90d --exported runs/logs\n\n"
        "sluice events prune --before 2026-01-01 --events postgresql://sluice@db/events --json -",
    )(prune)
    app.add_typer(commands)


def export(
    events: Url = EMBEDDED,
    out: Annotated[Path, typer.Option("--out", help="Folder of the partitions, one a day.")] = Path("runs/logs"),
    day: Annotated[
        list[datetime] | None,
        typer.Option(formats=["%Y-%m-%d"], help="A day in UTC; repeatable.", show_default="all not yet final"),
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
    from rich.console import Console
    from rich.table import Table

    from serving import export as module

    screen = Console(stderr=True, highlight=False)
    with _opened(events) as database:
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
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("day", "requests", "rows", "clicks", "conversions", "skips", "unmatched", ""):
        table.add_column(name, justify="left" if name in ("day", "") else "right")
    for one in written:
        figures = (one.exposures, one.rows, one.clicks, one.conversions, one.skips, one.unmatched)
        state = "final" if one.final else "events may still come"
        table.add_row(one.day, *(f"{figure:,}" for figure in figures), state)
    screen.print(table if written else "nothing new to write")
    write_json(json, {"out": out, "days": [vars(one) for one in written]})


def prune(
    events: Url = EMBEDDED,
    older_than: Annotated[
        str | None, typer.Option(metavar="DAYS", help="What is older goes: 90d, or 12w. Days are whole, in UTC.")
    ] = None,
    before: Annotated[
        datetime | None, typer.Option(formats=["%Y-%m-%d"], help="What was before this day, in UTC, goes.")
    ] = None,
    exported: Annotated[
        Path, typer.Option(help="Folder of the partitions; what is not in them for good does not go.")
    ] = Path("runs/logs"),
    without_export: Annotated[
        bool, typer.Option("--without-export", help="Days go though they were not exported.")
    ] = False,
    despite_experiments: Annotated[
        bool,
        typer.Option("--despite-experiments", help="Exposures go though running experiments rest on them."),
    ] = False,
    window_hours: Annotated[
        float, typer.Option(min=0.01, max=24 * 90, help="Events count so long after the exposure.")
    ] = 24.0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would go, by day, and remove nothing.")
    ] = False,
    json: Json = None,
) -> None:
    """Remove old exposures with their events from the database, while servers write to it or not.

    A day goes only if a final partition holds each of its exposures, and nothing goes that the results of a running
    experiment rest on. Small transactions, from the oldest day on: killed, it goes on when it is called again.
    """
    from rich.console import Console
    from rich.table import Table

    from serving import retention

    screen = Console(stderr=True, highlight=False)
    first = _first_day(older_than, before)
    window = timedelta(hours=window_hours)
    with _opened(events, lock_seconds=30.0) as database:
        folder = None if without_export else exported
        what = retention.plan(
            database, first, exported=folder, window=window, despite_experiments=despite_experiments, shown=True
        )
        if dry_run:
            table = Table(box=None, header_style="bold", pad_edge=False)
            for name in ("day", "exposures", "events", ""):
                table.add_column(name, justify="left" if name in ("day", "") else "right")
            for one in what.days:
                table.add_row(one.day, f"{one.exposures:,}", f"{one.events:,}", one.missing)
            screen.print(table if what.days else f"nothing is from before {first}")
        for name in what.ended:
            screen.print(f"the results of {name}, which is over, will lack what goes")
        told = {"before": first, "days": [vars(one) for one in what.days], "ended": what.ended}
        if dry_run:
            write_json(json, {**told, "obstacles": [problem for problem, _ in what.obstacles]})
            what.check(database.name)
            return
        done = retention.prune(database, what, shown=True)
    screen.print(f"{done.exposures:,} exposures and {done.events:,} events from before {first} are gone")
    if done.freed_bytes:
        screen.print(f"{done.freed_bytes:,} bytes of the file went back to the file system")
    if done.spare_bytes:
        screen.print(f"{done.spare_bytes:,} bytes of the file are unused, and used again by what comes")
    write_json(json, {**told, **vars(done)})


def _first_day(older_than: str | None, before: datetime | None) -> date:
    """Return the first day that stays."""
    from ctr_models.errors import ConfigError

    if (older_than is None) == (before is None):
        raise ConfigError("which days go?", remedy="give either --older-than 90d or --before 2026-01-01")
    if before is not None:
        return before.date()
    match = re.fullmatch(r"(\d{1,5})([dw])", older_than or "")
    if match is None:
        raise ConfigError(f"{older_than!r} is no age", where="--older-than", remedy="write 90d, or 12w")
    return datetime.now(UTC).date() - timedelta(days=int(match[1]) * (7 if match[2] == "w" else 1))


@contextmanager
def _opened(url: str, *, lock_seconds: float = 1.0) -> Iterator[Database]:
    from ctr_models.errors import DataError
    from serving.database import REMEDY, Database, Unavailable

    database = Database(url, lock_seconds=lock_seconds)
    try:
        yield database
    except Unavailable as error:
        raise DataError(f"the database can't be used ({error})", where=database.name, remedy=REMEDY) from None
    finally:
        database.close()
