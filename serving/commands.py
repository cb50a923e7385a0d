"""``sluice serve``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipelines.commands.options import TrackingUri
from serving import event_commands, experiment_commands, key_commands

_PAGE = """# Settings of the server

Each can be set in the environment; what is given as an option of `sluice serve` wins. A variable of this prefix
that is not listed here is refused, with the nearest one that is. This page is written by `sluice serve --settings`
(`make docs`).
"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        "serve",
        epilog="Examples:\n\n"
        "sluice serve -m models:/clicks@champion\n\n"
        "sluice serve -m runs/clicks/bundle --host 0.0.0.0 --port 9000\n\n"
        "sluice serve -m main=models:/clicks@champion -m next=models:/clicks@challenger\n\n"
        "sluice serve -m models:/clicks@champion --features runs/online\n\n"
        "sluice serve -m models:/clicks@champion --events postgresql://sluice@db/events\n\n"
        "curl localhost:8000/docs",
    )(serve)
    key_commands.register(app)
    event_commands.register(app)
    experiment_commands.register(app)


def serve(
    model: Annotated[
        list[str] | None,
        typer.Option(
            "-m",
            "--model",
            help="models:/name@alias, models:/name/version, or a bundle's path; repeatable, as slot=model.",
        ),
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.", show_default="127.0.0.1")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0 takes any.", show_default="8000")] = None,
    tracking_uri: TrackingUri = None,
    features: Annotated[
        str | None,
        typer.Option(
            help="Online feature store: a snapshot's folder, or redis://host:6379/0.", show_default="none"
        ),
    ] = None,
    events: Annotated[
        str | None,
        typer.Option(
            help="Database of exposures, events and experiments: sqlite:///file.db, postgresql://, or none.",
            show_default="sqlite:///runs/events.db",
        ),
    ] = None,
    keys: Annotated[
        Path | None, typer.Option(help="JSON file of API keys.", show_default="everyone may score")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that share the port.", show_default="1")] = None,
    threads: Annotated[
        int | None, typer.Option(help="Forward passes at once in each, a core each.", show_default="1")
    ] = None,
    max_candidates: Annotated[
        int | None, typer.Option(help="Most candidates a request.", show_default="2000")
    ] = None,
    parent: Annotated[
        int | None, typer.Option(help="End when this parent process does, even if it is killed.")
    ] = None,
    settings: Annotated[
        bool, typer.Option("--settings", help="Print all settings, those without an option too, and serve nothing.")
    ] = False,
) -> None:
    """Serve scores over HTTP: POST /v1/score, /healthz, /readyz, /metrics, /docs.

    Each option can also be set in the environment, as SLUICE_MODEL, SLUICE_PORT and so on.
    """
    from serving.settings import PREFIX, Settings

    if settings:
        from pipelines.reference import table

        typer.echo(f"{_PAGE}\n{table(Settings, PREFIX)}", nl=False)
        return
    from serving.server import run

    code = run(
        Settings.from_env(
            model=model or None,
            host=host,
            port=port,
            tracking_uri=tracking_uri,
            features=features,
            events_url=events,
            keys=keys,
            workers=workers,
            threads=threads,
            max_candidates=max_candidates,
            parent=parent,
        )
    )
    if code:
        raise typer.Exit(code)
