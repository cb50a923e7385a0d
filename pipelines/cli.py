"""The ``sluice`` command: gathers its subcommands from the entry-point group ``sluice.commands``."""

from __future__ import annotations

import errno
import os
import re
import sys
import traceback
from importlib.metadata import entry_points, version
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

# MLflow reports its use to its makers unless told not to; users' logs are not ours to talk about.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

_PLACES = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EEXIST,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.ENOSPC,
    errno.EDQUOT,
}
"""What the operating system says of a place that can't be used: its user can put that right."""

_ROAD = (
    *("demo", "data", "init", "config", "features", "train", "compare", "gates", "models", "promote", "score"),
    *("materialize", "serve", "keys", "events", "experiments", "bench"),
)
"""The commands in the order in which they are met."""


_UsageError: Any = typer.BadParameter.__base__
"""Typer exports nothing but its subclasses."""


class _Commands(TyperGroup):
    """Lists commands along the road, those of other packages last, and knows an override that lacks its option."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(
            super().list_commands(ctx), key=lambda name: _ROAD.index(name) if name in _ROAD else len(_ROAD)
        )

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except _UsageError as error:
            _explain_override(error)
            raise


def _explain_override(error: Any) -> None:
    """Raise what an override that stands alone lacks; Typer calls it an unexpected argument."""
    found = re.search(r"unexpected extra arguments?(?:\(s\))? \((\w[\w.]*=.*)\)", error.message, re.DOTALL)
    if found is None or all(one.name != "override" for one in error.ctx.command.params):
        return
    from ctr_models.errors import ConfigError

    raise ConfigError("an override stands alone", where=found[1], remedy="give it with -o") from None


def build_app() -> typer.Typer:
    """Return the application with the subcommands of every installed distribution."""
    app = typer.Typer(
        name="sluice",
        cls=_Commands,
        help="From click logs to ranked answers, and which gate makes them better.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        add_completion=False,
        rich_markup_mode="rich",
        epilog="Exit codes: 0 done; 1 a bar was missed, or a check failed; 2 a mistake in what was given, told in "
        "one line; 3 an error of Sluice's own.",
    )
    app.callback()(_options)
    for point in sorted(entry_points(group="sluice.commands"), key=lambda p: p.name):
        point.load()(app)
    return app


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"sluice {version('sluice')}")
        raise typer.Exit


def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version, and end.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line. A user's error is one line and exit code 2; anything else is a traceback and 3.

    1, Python's own code for a traceback, says that a bar was missed, and jobs go by it.
    """
    sys.path.append("")  # gates and models in the folder where one works are found, as by python -m
    try:
        build_app()()
    except Exception as error:
        # Imported here, since the package behind it brings torch, which --help has no use for.
        from ctr_models.errors import SluiceError

        if isinstance(error, OSError) and error.errno in _PLACES and error.filename is not None:
            reason = "a file is in the way" if error.errno == errno.EEXIST else error.strerror
            error = SluiceError(
                f"can't be used ({reason})",
                where=str(error.filename),
                remedy="give another path, or see to its rights and room",
            )
        if not isinstance(error, SluiceError):
            traceback.print_exc()
            sys.exit(3)
        Console(stderr=True).print(Text.assemble(("error: ", "bold red"), str(error)), soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
