from __future__ import annotations

import json

import polars as pl
import pytest
import typer
from typer.testing import CliRunner

from ctr_models.errors import ConfigError
from pipelines.benchmarks import accuracy_bench, gates_bench
from pipelines.benchmarks.gates_bench import BUDGETS, Budget, remaining
from pipelines.config import load_config

SETTINGS = """
seed: 7
data: {source: frappe}
model: {name: gdcn, cross_layers: 1, mlp: {hidden: [4]}}
train: {epochs: 9, batch_size: 256, embedding: {backend: dense}}
"""


@pytest.fixture
def given(frappe, tmp_path, monkeypatch):
    """Arguments for one small model, two gates beside the control in its slot cross, two seeds, one epoch."""
    path = tmp_path / "published" / "frappe_x1" / "gdcn.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(SETTINGS)
    monkeypatch.setattr(accuracy_bench, "PUBLISHED", tmp_path / "published")
    monkeypatch.setattr(gates_bench, "BUDGETS", {"gdcn": Budget("frappe_x1/gdcn", ("train.epochs=1",))})
    runs = ["--workdir", tmp_path / "runs"]
    return ["--data", frappe, "--slots", "cross", "--seeds", 2, *runs]


def bench(*arguments):
    app = typer.Typer()
    app.command()(gates_bench.main)
    return CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "200"})


def test_two_processes_share_the_work_and_a_third_call_reports_it(given, tmp_path):
    first = bench(*given, "--part", "1/2", "--json", "-")
    assert first.exit_code == 0, first.output
    assert "gdcn, cross: none, seed 7: valid AUC 0." in first.stderr
    assert {k: v for k, v in json.loads(first.stdout)["figures"].items() if k in ("trainings", "left")} == {
        "trainings": 6,
        "left": 3,
    }
    second = bench(*given, "--part", "2/2")
    assert second.exit_code == 0, second.output
    stamps = [p.stat().st_mtime_ns for p in sorted(tmp_path.rglob("finished/result.json"))]
    assert len(stamps) == 6

    page, markdown = tmp_path / "site", tmp_path / "docs" / "gates.md"
    result = bench(*given, "--page", page, "--markdown", markdown, "--json", "-", "--at-least", "left=1")
    assert result.exit_code == 1
    assert "missed: left is 0" in result.stderr
    assert [p.stat().st_mtime_ns for p in sorted(tmp_path.rglob("finished/result.json"))] == stamps

    figures = json.loads(result.stdout)["figures"]
    assert figures["better"] + figures["worse"] + figures["noise"] == 2
    assert figures["failed"] == 0
    difference = figures["auc_gdcn_cross_sigmoid"] - figures["auc_gdcn_cross_none"]
    assert figures["difference_gdcn_cross_sigmoid"] == pytest.approx(difference, abs=1e-9)

    cells = pl.read_parquet(tmp_path / "runs" / "cells.parquet")
    assert cells.select("gate", "seed").rows() == [
        (gate, seed) for gate in ("none", "recursive", "sigmoid") for seed in (7, 8)
    ]
    sigmoid = cells.filter(gate="sigmoid", seed=7).to_dicts()[0]
    assert json.loads(sigmoid["telemetry"])["cross.gates.0"]["mean"] == pytest.approx(sigmoid["gate_mean"])
    assert 0.3 < sigmoid["gate_mean"] < 0.7  # a sigmoid that has hardly been trained
    width = 100  # ten fields of the source's dimension 10
    plain = cells.filter(gate="none", seed=7).to_dicts()[0]
    assert sigmoid["parameters"] - plain["parameters"] == width**2
    assert sigmoid["flops_per_row"] - plain["flops_per_row"] >= 2 * width**2
    assert cells["milliseconds"].min() > 0
    table = pl.read_parquet(tmp_path / "runs" / "gates.parquet")
    assert table.filter(gate="sigmoid")["auc_value"][0] == figures["difference_gdcn_cross_sigmoid"]
    assert "recursive" in (page / "gates.html").read_text()
    assert "| cross | `sigmoid`" in markdown.read_text()


def test_a_gate_that_the_model_refuses_is_shown(given, monkeypatch):
    from pipelines.training import trainer

    whole = trainer.train

    def refuses(config, data, **options):
        if config.model.gates["cross"].name == "sigmoid":
            raise ConfigError("does not fit", where="model.gates.cross")
        return whole(config, data, **options)

    monkeypatch.setattr(trainer, "train", refuses)
    result = bench(*given, "--gates", "ctr_models.gates.sigmoid.SigmoidGate", "--seeds", 1, "--at-most", "failed=0")
    assert result.exit_code == 1
    assert "gdcn, cross: sigmoid, seed 7: failed: ConfigError: model.gates.cross: does not fit" in result.stderr
    assert "failed: ConfigError" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "gdnc"], "--models: no 'gdnc'. did you mean 'gdcn'?"),
        (["--slots", "cros"], "--slots: no 'cros'. did you mean 'cross'?"),
        (["--gates", "sigmod"], "--gates: unknown gate 'sigmod'. did you mean 'sigmoid'?"),
        (["--slots", "expert"], "--slots, --gates: no gate fits these slots"),
        (["--part", "3/2"], "--part: '3/2' is no part"),
        (["--part", "one"], "--part: 'one' is no part"),
    ],
)
def test_mistakes_are_named(given, arguments, message):
    result = bench(*given, *arguments)
    assert isinstance(result.exception, ConfigError)
    assert message in str(result.exception)


def test_what_is_left_is_told_from_what_was_done():
    assert remaining(["a", "b"], {}) == ""
    assert remaining([], {"a": [60.0]}) == ""
    assert remaining(["a", "b"], {"a": [60.0]}) == ", about 2 min"
    assert remaining(["a", "b"], {"a": [3600.0], "b": [7200.0, 10800.0]}) == ", about 3.5 h"


@pytest.mark.parametrize("name", BUDGETS)
def test_budgets_change_published_settings_of_the_model_that_they_name(name):
    budget = BUDGETS[name]
    path = accuracy_bench.PUBLISHED / f"{budget.settings}.yaml"
    published, cut = load_config(path), load_config(path, budget.overrides)
    assert cut.model.name == name
    assert cut.model.gates == published.model.gates
    assert cut.train.epochs < published.train.epochs
