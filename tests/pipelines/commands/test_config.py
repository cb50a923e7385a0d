from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from ctr_models.errors import ConfigError
from pipelines.config import load_config
from pipelines.reference import reference


def test_check_says_what_the_file_asks_for(app: typer.Typer, tmp_path: Path) -> None:
    file = tmp_path / "ctr.yaml"
    file.write_text("model: {name: gdcn, gates: {cross: none}}\nseed: 7\n")
    result = CliRunner().invoke(app, ["config", "check", "-c", str(file)])
    assert result.exit_code == 0, result.output
    assert (
        result.output == f"{file}: valid. gdcn (field: none, feature: none, cross: none) on click_world, seed 7.\n"
    )


def test_check_full_prints_a_file_that_reads_back_as_the_same(app: typer.Typer, tmp_path: Path) -> None:
    # plateau and clip_norm have defaults: their null must not be lost.
    overrides = ["train.epochs=3", "train.plateau=null", "train.clip_norm=null"]
    words = [word for override in overrides for word in ("-o", override)]
    result = CliRunner().invoke(app, ["config", "check", *words, "--full"])
    assert result.exit_code == 0, result.output
    written = tmp_path / "ctr.yaml"
    written.write_text(result.output)
    assert load_config(written) == load_config(None, overrides)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epoch=3", "did you mean 'epochs'"),
        ("data.source=click_word", "did you mean 'click_world'"),
        ("data.options.user=3", "data.options.user: unknown key"),
    ],
)
def test_check_refuses_what_is_not_there(app: typer.Typer, override: str, message: str) -> None:
    result = CliRunner().invoke(app, ["config", "check", "-o", override])
    assert isinstance(result.exception, ConfigError)
    assert message in str(result.exception)


def test_schema_prints_json_and_reference_prints_the_page(app: typer.Typer) -> None:
    result = CliRunner().invoke(app, ["config", "schema"])
    assert json.loads(result.output)["title"] == "Sluice run"
    assert CliRunner().invoke(app, ["config", "reference"]).output == reference()
