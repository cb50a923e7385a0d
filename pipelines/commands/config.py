"""``sluice config``: check a file, describe every key."""

from __future__ import annotations

from typing import Annotated

import typer

from pipelines.commands.options import Config, Override


def register(app: typer.Typer) -> None:
    """Add ``sluice config``."""
    group = typer.Typer(no_args_is_help=True, help="Check a configuration, or describe every key of it.")
    group.command("check", epilog="Example: sluice config check -c ctr.yaml -o model.name=gdcn")(check)
    group.command("schema", epilog="Example: sluice config schema > ctr.schema.json")(schema)
    group.command("reference", epilog="Example: sluice config reference > docs/configuration.md")(reference)
    app.add_typer(group, name="config")


def check(
    config: Config = None,
    override: Override = None,
    full: Annotated[bool, typer.Option("--full", help="Print every setting, defaults included.")] = False,
) -> None:
    """Check every key and value of a configuration; exit code 2 and one line say what is wrong."""
    from pipelines.config import dump_config, load_config
    from pipelines.datasets.base import check_options

    checked = load_config(config, override or ())
    check_options(checked.data)
    if full:
        typer.echo(dump_config(checked), nl=False)
    else:
        gates = ", ".join(f"{slot}: {gate.name}" for slot, gate in checked.model.all_gates.items())
        typer.echo(
            f"{config or 'defaults'}: valid. {checked.model.name}{f' ({gates})' if gates else ''}"
            f" on {checked.data.source}, seed {checked.seed}."
        )


def schema() -> None:
    """Print the JSON schema of ctr.yaml, for editors."""
    import json

    from pipelines.reference import json_schema

    typer.echo(json.dumps(json_schema(), indent=2))


def reference() -> None:
    """Print the page of all settings, as Markdown."""
    from pipelines.reference import reference as page

    typer.echo(page(), nl=False)
