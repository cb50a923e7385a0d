"""The ``sluice`` command: gathers its subcommands from the entry-point group ``sluice.commands``."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from importlib.metadata import entry_points

import typer
from rich.console import Console
from rich.text import Text

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


def build_app() -> typer.Typer:
    """Return the application with the subcommands of every installed distribution."""
    app = typer.Typer(
        name="sluice",
        help="From click logs to ranked answers, and which gate makes them better.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        add_completion=False,
        rich_markup_mode="rich",
        epilog="Exit codes: 0 done; 1 a bar was missed, or a check failed; 2 a mistake in what was given, told in "
        "one line; 3 an error of Sluice's own.",
    )
    for point in sorted(entry_points(group="sluice.commands"), key=lambda p: p.name):
        point.load()(app)
    return app


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
