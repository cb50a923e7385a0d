from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import typer
from typer.testing import CliRunner

from ctr_models.errors import ConfigError, DataError
from pipelines.benchmarks import accuracy_bench
from pipelines.benchmarks.report import BenchReport
from pipelines.config import load_config

SETTINGS = """
seed: 7
data: {source: frappe}
model: {name: dnn, mlp: {hidden: [4]}}
train: {epochs: 2, batch_size: 256, threads: 1, embedding: {backend: dense}}
"""
SHIPPED = sorted(accuracy_bench.PUBLISHED.glob("*/*.yaml"))


@pytest.fixture
def published(tmp_path, monkeypatch):
    folder = tmp_path / "published"
    for model in ("dnn", "wide"):
        path = folder / "frappe_x1" / f"{model}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(SETTINGS)
    monkeypatch.setattr(accuracy_bench, "PUBLISHED", folder)


def bench(*arguments):
    app = typer.Typer()
    app.command()(accuracy_bench.main)
    return CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "200"})


def test_every_seed_is_trained_once_and_held_against_the_bars(frappe, published, tmp_path):
    given = ["--data", frappe, "--models", "dnn", "--seeds", 2, "--workdir", tmp_path / "runs", "--json", "-"]
    result = bench(*given, "--at-least", "auc_dnn=0.5")
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)["figures"]
    assert figures["auc_dnn_min"] <= figures["auc_dnn"] <= figures["auc_dnn_max"]
    assert figures["auc_dnn"] == pytest.approx((figures["auc_dnn_min"] + figures["auc_dnn_max"]) / 2)
    assert "seed 7" in result.stderr
    assert "seed 8" in result.stderr

    finished = sorted((tmp_path / "runs" / "frappe_x1" / "dnn").rglob("result.json"))
    stamps = [p.stat().st_mtime_ns for p in finished]
    missed = bench(*given, "--at-least", "auc_dnn=0.9999")
    assert missed.exit_code == 1
    assert "missed: auc_dnn is 0." in missed.stderr
    assert json.loads(missed.stdout)["figures"] == figures
    assert [p.stat().st_mtime_ns for p in finished] == stamps


def test_a_folder_of_several_data_sets_serves_too(frappe, published, tmp_path):
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "frappe").symlink_to(frappe)
    result = bench(
        *("--data", tmp_path / "all", "--dataset", "frappe_x1", "--models", "wide", "--seeds", 1),
        *("--workdir", tmp_path / "runs"),
    )
    assert result.exit_code == 0, result.output
    assert "wide" in result.output


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["--models", "dnnn"], ConfigError, "--models: no published settings for 'dnnn'. did you mean 'dnn'?"),
        (
            ["--dataset", "frape"],
            ConfigError,
            "--dataset: no published settings for 'frape'. did you mean 'frappe_x1'?",
        ),
    ],
)
def test_mistakes_are_named(frappe, published, tmp_path, arguments, error, message):
    result = bench("--data", frappe, "--workdir", tmp_path, *arguments)
    assert isinstance(result.exception, error)
    assert message in str(result.exception)


def test_models_are_compared_with_the_control_on_the_same_rows(frappe, published, tmp_path):
    given = ["--data", frappe, "--seeds", 1, "--workdir", tmp_path, "--json", "-", "--control", "wide"]
    result = bench(*given, "--at-least", "gain_dnn=-1")
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)["figures"]
    assert figures["gain_dnn_low"] <= figures["gain_dnn"] <= figures["gain_dnn_high"]
    assert figures["gain_dnn"] == pytest.approx(figures["auc_dnn"] - figures["auc_wide"], abs=1e-6)
    assert "gain_wide" not in figures
    wrong = bench(*given[:-1], "wid")
    assert isinstance(wrong.exception, ConfigError)
    assert "did you mean 'wide'" in str(wrong.exception)


def test_models_are_compared_within_the_rows_that_are_named():
    rng = np.random.default_rng(0)
    rows = np.arange(600)
    label = rng.integers(0, 2, 600)
    tenth = rows % 2  # in the odd rows the challenger knows the answer
    noise = rng.random(600)
    knows = np.where(tenth == 1, 0.8 * label + 0.1 + 0.01 * noise, noise)
    frames = {
        name: [pl.DataFrame({"row": rows, "user": rows // 3, "label": label, "probability": p})]
        for name, p in {"none": noise, "knows": knows}.items()
    }
    encoded = pl.LazyFrame({"__row__": rows[::-1], "tenth": tenth[::-1]})
    data = SimpleNamespace(
        state=SimpleNamespace(spec=SimpleNamespace(keep=("tenth",))),
        frame=lambda split: encoded if split == "test" else None,
    )
    report = BenchReport("gains", ["model"])
    accuracy_bench._compare(report, frames, "none", data, ["tenth=1", "tenth=0"])
    assert report.figures["gain_knows_tenth_1"] > 0.4
    assert report.figures["gain_knows_tenth_0"] == 0
    assert 0.1 < report.figures["gain_knows"] < 0.4
    assert any("where tenth is 1" in note and "300 rows" in note for note in report.notes)
    with pytest.raises(ConfigError, match="did you mean 'tenth'"):
        accuracy_bench._compare(report, frames, "none", data, ["tent=1"])


def test_a_folder_of_something_else_is_named(tmp_path):
    result = bench("--data", tmp_path)
    assert isinstance(result.exception, DataError)
    assert "neither Frappe_x1" in str(result.exception)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_shipped_settings_are_valid(path):
    config = load_config(path)
    assert config.name == f"{path.parent.name}-{path.stem}"
    assert config.train.embedding.backend == "dense"  # as published: every optimiser over whole tables


def test_the_models_that_the_targets_name_have_settings():
    assert {p.stem for p in SHIPPED if p.parent.name == "frappe_x1"} >= {"finalmlp", "gdcn_p", "dcnv2", "dnn"}
    assert {p.stem for p in SHIPPED if p.parent.name == "movielens_1m"} >= {"finalmlp", "gdcn_p", "dcnv2"}
