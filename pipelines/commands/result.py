"""What a command leaves for a script: the option ``--json``."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

Target = TypeVar("Target", str, Path, None)


def writable(target: Target) -> Target:
    """Refuse a file that can't be written, before hours of work are done for it.

    Args:
        target: what ``--json`` was given.

    Raises:
        ConfigError: it is a folder, or where it should stand there is none that may be written to.
    """
    if target is None or str(target) == "-":
        return target
    path = Path(target).absolute()
    folder = next(one for one in path.parents if one.exists())
    if path.is_dir() or not (folder.is_dir() and os.access(folder, os.W_OK)):
        from ctr_models.errors import ConfigError

        problem = "this is a folder" if path.is_dir() else f"nothing can be written into {folder}"
        raise ConfigError(problem, where=f"--json {target}", remedy="name a file, or - to have it printed")
    return target


Json = Annotated[
    str | None,
    typer.Option("--json", callback=writable, help="Write the result as JSON to this file; - prints it."),
]


def write_json(target: str | None, content: Any) -> None:
    """Write a result whole, or print it.

    Args:
        target: what ``--json`` was given: a file, ``-`` for the standard output, None for nothing.
        content: plain values, paths and dates; JSON has no NaN, so a figure that is undefined is null.
    """
    if target is None:
        return
    from pipelines.features.files import atomic_write

    text = json.dumps(_plain(content), indent=2, default=str, allow_nan=False)
    if target == "-":
        typer.echo(text)
    else:
        atomic_write(Path(target), text + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value
