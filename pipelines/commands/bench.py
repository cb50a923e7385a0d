"""``sluice bench <name>``: one subcommand for each ``benchmarks/<name>_bench.py`` of the house.

A benchmark is a module beside what it measures, with a function ``main`` whose signature is its options. It
is imported only when it is asked for.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup

PACKAGES = ("kernels", "ctr_models", "pipelines", "serving")


def benchmarks() -> dict[str, str]:
    """Return the module of every benchmark by its name.

    Example:
        >>> benchmarks()["train"]
        'pipelines.benchmarks.train_bench'
    """
    found = {}
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)  # a top-level name: located, not imported
        for folder in (spec.submodule_search_locations or []) if spec else []:
            for file in sorted((Path(folder) / "benchmarks").glob("*_bench.py")):
                name = file.stem.removesuffix("_bench").replace("_", "-")
                found[name] = f"{package}.benchmarks.{file.stem}"
    return found


class _Benchmarks(TyperGroup):
    """A group whose commands are found by file and imported when used."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(benchmarks())

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        module = benchmarks().get(cmd_name)
        if module is None:
            return None
        one = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)
        one.command(cmd_name)(importlib.import_module(module).main)
        command = typer.main.get_command(one)
        command.name = cmd_name
        return command


def register(app: typer.Typer) -> None:
    """Add ``sluice bench``."""
    group = typer.Typer(cls=_Benchmarks, no_args_is_help=True)

    @group.callback(
        epilog="Example: sluice bench train --json train.json --at-least ratio_usual_4m=2",
        invoke_without_command=False,
    )
    def bench() -> None:
        """Measure a hot path; every figure can be held against a bar."""

    app.add_typer(group, name="bench")
