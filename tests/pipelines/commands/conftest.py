"""The command line as it is installed."""

from __future__ import annotations

import pytest
import typer

from pipelines.cli import build_app


@pytest.fixture
def app() -> typer.Typer:
    return build_app()
