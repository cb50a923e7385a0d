"""``sluice init``, ``sluice features`` and ``sluice data world`` as a user calls them."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest
from typer.testing import CliRunner, Result

from ctr_models.errors import ConfigError, DataError
from pipelines.cli import build_app
from pipelines.config import load_config
from pipelines.datasets.click_world import ClickWorldOptions, write_world

WORLD = ClickWorldOptions(rows=4_000, users=80, items=60, days=5)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def world() -> Path:
    write_world(WORLD, Path("world"))
    return Path("world")


def sluice(*arguments: object) -> Result:
    return CliRunner().invoke(build_app(), [str(a) for a in arguments], catch_exceptions=False)


def test_init_writes_a_config_that_loads(world: Path) -> None:
    result = sluice("init", "--data", world, "--json", "init.json")
    assert "wrote ctr.yaml" in result.stdout
    assert "user feature" in result.stdout
    config = load_config(Path("ctr.yaml"))
    assert config.features is not None
    report = json.loads(Path("init.json").read_text())
    assert (report["label"], report["user"], report["rows"]) == ("click", "user_id", 4_000)
    used = {c["name"]: c for c in report["columns"]}
    assert used["price"]["encode"] == "standard"
    assert used["true_probability"]["use"] == "keep"


def test_init_never_overwrites_unless_told(world: Path) -> None:
    Path("ctr.yaml").write_text("name: precious\n")
    with pytest.raises(ConfigError, match=r"ctr.yaml: is there already. give another --out, or --force"):
        sluice("init", "--data", world)
    with pytest.raises(ConfigError, match=r"ctr.yaml: name"):
        sluice("init", "--data", world, "--force", "--name", "not a name")
    assert Path("ctr.yaml").read_text() == "name: precious\n"
    sluice("init", "--data", world, "--force", "--name", "mine")
    assert load_config(Path("ctr.yaml")).name == "mine"


def test_init_json_on_the_screen_is_json_alone(world: Path) -> None:
    assert json.loads(sluice("init", "--data", world, "--json", "-").stdout)["config"] == "ctr.yaml"


def test_features_tells_rows_tables_and_shares(world: Path) -> None:
    sluice("init", "--data", world)
    shown = sluice("features", "-c", "ctr.yaml").stdout
    assert "3,200 train, 400 valid, 400 test" in shown
    report = json.loads(sluice("features", "-c", "ctr.yaml", "--json", "-").stdout)
    assert report["rows"] == {"train": 3_200, "valid": 400, "test": 400}
    assert report["rows_per_second"] > 0
    fields = {f["name"]: f for f in report["fields"]}
    assert fields["price"]["kind"] == "float"
    assert fields["segment"]["table_rows"] == 10
    assert fields["history"]["table"] == "item_id"
    assert fields["segment"]["missing"] == fields["segment"]["unknown"] == 0
    valid = pl.read_parquet(f"{report['path']}/valid/*.parquet")
    assert fields["campaign"]["unknown"] == pytest.approx((valid["campaign"] == 1).mean())
    assert Path(report["path"]).is_relative_to("runs/features")


def test_features_takes_overrides(world: Path) -> None:
    sluice("init", "--data", world)
    arguments = [
        "features",
        "-c",
        "ctr.yaml",
        "-o",
        "data.split.train=0.5",
        "-o",
        "workdir=elsewhere",
        "--json",
        "-",
    ]
    report = json.loads(sluice(*arguments).stdout)
    assert report["rows"]["train"] == 2_000
    assert report["path"].startswith("elsewhere")


def test_world_writes_all_days_or_one() -> None:
    options = ["--rows", 4_000, "--users", 80, "--items", 60, "--days", 5]
    report = json.loads(sluice("data", "world", "--out", "all", *options, "--json", "-").stdout)
    assert (report["rows"], len(report["files"])) == (4_000, 5)
    assert 0.7 < report["best_auc"] < 0.9
    shown = sluice("data", "world", "--out", "grown", *options, "--day", "2026-01-03").stdout
    assert "800 rows in 1 files" in shown
    name = "clicks-2026-01-03.parquet"
    assert (Path("grown") / name).read_bytes() == (Path("all") / name).read_bytes()
    with pytest.raises(DataError, match=r"the world has no 2026-02-01. give a day from 2026-01-01 to 2026-01-05"):
        sluice("data", "world", "--out", "grown", *options, "--day", "2026-02-01")
    with pytest.raises(ConfigError, match=r"rows must be at least one a day"):
        sluice("data", "world", "--out", "none", "--rows", 1)


def test_help_has_examples() -> None:
    for command in (["init"], ["features"], ["data", "world"]):
        assert "Example" in sluice(*command, "--help").stdout
