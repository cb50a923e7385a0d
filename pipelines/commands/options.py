"""Options that commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Config = Annotated[
    Path | None, typer.Option("-c", "--config", help="The run's ctr.yaml.", show_default="the built-in click world")
]
Override = Annotated[
    list[str] | None, typer.Option("-o", "--override", help="key.sub=value, repeatable; values are YAML.")
]
TrackingUri = Annotated[str | None, typer.Option(help="MLflow store.", show_default="the one under runs")]
