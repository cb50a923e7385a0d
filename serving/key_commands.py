"""``sluice keys``: the API keys of a deployment."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from pipelines.commands.result import Json, write_json

KeysFile = Annotated[Path, typer.Argument(metavar="FILE", help="JSON file of the keys, as given to sluice serve.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    keys = typer.Typer(
        name="keys",
        no_args_is_help=True,
        help="API keys of a scoring server: made, listed, revoked. A running server takes changes up by itself.",
        epilog="Examples:\n\nsluice keys new keys.json --scopes score,events --rate 200 --note shop\n\n"
        "sluice serve -m models:/clicks@champion --keys keys.json\n\n"
        'curl -H "Authorization: Bearer $KEY" ...',
    )
    keys.command("new")(new)
    keys.command("list")(show)
    keys.command("revoke")(revoke)
    app.add_typer(keys)


def new(
    file: KeysFile,
    scopes: Annotated[str, typer.Option(help="Comma-separated, of score, events, admin.")] = "score",
    rate: Annotated[float | None, typer.Option(help="Requests a second on average.", show_default="any")] = None,
    burst: Annotated[int, typer.Option(help="Requests at once beyond the rate.")] = 10,
    expires: Annotated[datetime | None, typer.Option(help="From when on it is worth nothing, in UTC.")] = None,
    note: Annotated[str, typer.Option(help="What it is for.")] = "",
) -> None:
    """Make a key, print it once, and keep its hash. To rotate: make a new one, hand it out, revoke the old.

    Example: sluice keys new keys.json --scopes score,events --rate 200 --note shop
    """
    from datetime import UTC

    from serving.security import KeyFile, new_key

    wanted = [scope.strip() for scope in scopes.split(",") if scope.strip()]
    until = None if expires is None else expires.replace(tzinfo=expires.tzinfo or UTC)
    token, key = new_key(wanted, rate=rate, burst=burst, expires=until, note=note)
    with KeyFile.alone(file):
        old = KeyFile.read(file) if file.exists() else KeyFile()
        KeyFile(keys=(*old.keys, key)).write(file)
    typer.echo(token)
    typer.echo("This is the only time that it is shown.", err=True)


def show(file: KeysFile, json: Json = None) -> None:
    """List the keys: ids, scopes, rates, never the keys themselves.

    Example: sluice keys list keys.json --json -
    """
    from rich.console import Console
    from rich.table import Table

    from serving.security import KeyFile

    table = Table("id", "scopes", "rate", "burst", "expires", "note")
    found = KeyFile.read(file).keys
    for key in found:
        rate, until = "any" if key.rate is None else f"{key.rate:g}/s", "never"
        if key.expires is not None:
            until = f"{key.expires:%Y-%m-%d %H:%M}"
        table.add_row(key.id, ", ".join(sorted(key.scopes)), rate, str(key.burst), until, key.note)
    Console(stderr=json == "-").print(table)
    write_json(json, [key.model_dump(mode="json", exclude={"hash"}) for key in found])


def revoke(file: KeysFile, key: Annotated[str, typer.Argument(metavar="ID", help="From the list.")]) -> None:
    """Take a key away, for good.

    Example: sluice keys revoke keys.json 1f0c9a3e
    """
    from ctr_models.errors import ConfigError, nearest
    from serving.security import KeyFile

    with KeyFile.alone(file):
        old = KeyFile.read(file)
        kept = tuple(one for one in old.keys if one.id != key)
        if len(kept) == len(old.keys):
            raise ConfigError(f"no key {key!r}", where=str(file), remedy=nearest(key, [one.id for one in old.keys]))
        KeyFile(keys=kept).write(file)
    typer.echo(f"{key} is revoked; {len(kept)} left")
