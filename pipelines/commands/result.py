"""What a command leaves for a script: the option ``--json``."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer

Json = Annotated[str | None, typer.Option("--json", help="Write the result as JSON to this file; - prints it.")]


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
