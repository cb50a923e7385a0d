"""``sluice demo``: the whole road, from raw logs to a scored request and a report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipelines.commands.result import Json, write_json


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        "demo",
        epilog="Examples:\n\nsluice demo\n\nsluice demo --data ml-100k --out runs/movielens",
    )(demo)


def demo(
    data: Annotated[
        Path | None,
        typer.Option("--data", help="Folder of MovieLens-100K; without it, a simulated world of clicks."),
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="Where everything goes.")] = Path("runs/demo"),
    rows: Annotated[int, typer.Option(min=2000, help="Rows of the simulated world.")] = 300_000,
    json: Json = None,
) -> None:
    """Logs, features, two models with two gates each, comparison, registry, running server, report.

    What an earlier call has finished is taken from there: a second call takes seconds.
    """
    import signal
    import sys

    from rich.console import Console

    from serving.walkthrough import Walkthrough

    # A polite request to end unwinds the stack, so that the server goes as well.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    screen = Console(stderr=json == "-", highlight=False)
    write_json(json, Walkthrough(out, data, rows, screen).run())
