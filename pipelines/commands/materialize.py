"""``sluice materialize``: fills the online feature store."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipelines.commands.options import Config, Override
from pipelines.commands.result import Json, write_json


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        "materialize",
        epilog="Examples:\n\n"
        "sluice materialize -c ctr.yaml --out runs/online\n\n"
        "sluice materialize -c ctr.yaml --redis redis://cache:6379/0 --at 2026-01-31T00:00:00\n\n"
        "sluice serve -m models:/clicks@champion --features runs/online",
    )(materialize)


def materialize(
    config: Config = None,
    override: Override = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Write a snapshot: a folder that servers map into memory.")
    ] = None,
    redis: Annotated[
        str | None,
        typer.Option("--redis", help="Write to a Redis: redis://host:6379/0, rediss:// or unix://."),
    ] = None,
    at: Annotated[
        str | None,
        typer.Option(
            "--at",
            help="The moment, written as the log's times are: histories hold what happened strictly before it. "
            "Left out: after the last row.",
        ),
    ] = None,
    json_path: Json = None,
) -> None:
    """Write what scoring needs of the log at a moment: users' columns and histories, items' columns.

    Servers with --features then score requests that give no more than the ids. A store of earlier contents is
    replaced at one stroke, while it is read.
    """
    import time

    from ctr_models.errors import ConfigError
    from pipelines.config import load_config
    from pipelines.datasets.base import open_data
    from pipelines.features.materialize import materialize as gather
    from pipelines.features.progress import steps
    from pipelines.features.redis_store import check_redis, write_redis
    from pipelines.features.snapshot import write_snapshot

    if (out is None) == (redis is None):
        raise ConfigError("give --out or --redis, one of them", where="sluice materialize")
    if redis is not None:
        check_redis(redis)
    run = load_config(config, override or ())
    started = time.perf_counter()
    shown = json_path != "-"
    features = gather(open_data(run.data), run.features, workdir=run.workdir, at=at, progress=shown)
    total = sum(len(rows) for rows in (features.users, features.items) if rows is not None)
    with steps(shown) as step:
        done = step("writing", total)
        if out is not None:
            manifest = write_snapshot(features, out, on_rows=done)
            where = str(out)
        else:
            assert redis is not None
            manifest = write_redis(features, redis, on_rows=done)
            where = manifest["version"]
    seconds = time.perf_counter() - started
    if shown:
        parts = " and ".join(f"{count:,} {kind}" for kind, count in manifest["rows"].items())
        typer.echo(f"{parts} in {seconds:.1f} s: {where}")
    write_json(json_path, {**manifest, "seconds": seconds})
