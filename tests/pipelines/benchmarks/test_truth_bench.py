from __future__ import annotations

import json
from dataclasses import replace

import pytest
import typer
from typer.testing import CliRunner

from ctr_models.errors import ConfigError
from pipelines.benchmarks import truth_bench, truth_parts
from pipelines.benchmarks.report import BenchReport
from pipelines.benchmarks.truth_parts import PARTS, Part

KEPT = {
    "optfs": ("annealed", "none"),
    "orders": ("order_2",),
    "experts": ("attention_weighted", "features_softmax"),
    "shortcuts": ("none", "field_mixer"),
}


@pytest.fixture
def tiny(monkeypatch):
    """The same parts with fewer arms and one epoch."""
    parts = {}
    for name, kept in KEPT.items():
        arms = {arm: PARTS[name].arms[arm] for arm in kept}
        parts[name] = replace(
            PARTS[name], arms={arm: {**tree, "train": {**tree["train"], "epochs": 1}} for arm, tree in arms.items()}
        )
    monkeypatch.setattr(truth_parts, "PARTS", parts)


def bench(*arguments):
    app = typer.Typer()
    app.command()(truth_bench.main)
    return CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "200"}, catch_exceptions=False)


def test_the_whole_command_on_small_worlds(tiny, tmp_path):
    given = ["--seeds", 1, "--rows", 1000, "--workdir", tmp_path / "runs", "--json", "-"]
    result = bench(*given, "--plots", tmp_path / "plots", "--at-least", "optfs_recall=0")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    figures = told["figures"]
    assert 0 <= figures["optfs_false_drops"] <= 1
    assert 0 <= figures["experts_nmi_attention_weighted"] <= 1
    assert 0 <= figures["experts_nmi_features_softmax"] <= 1
    assert figures["told_orders"] in (0, 1)
    gain = figures["shortcuts_auc_disagrees_field_mixer"] - figures["shortcuts_auc_disagrees_none"]
    assert figures["shortcuts_auc_disagrees_gain_field_mixer"] == pytest.approx(gain)
    assert figures["optfs_recall_low"] is None  # one world has no interval
    assert figures["optfs_best_possible_auc"] > 0.7
    assert {p.name for p in (tmp_path / "plots").iterdir()} == {f"known-truth-{name}.svg" for name in PARTS}

    kept = sorted((tmp_path / "runs").rglob("figures.json"))
    assert len(kept) == 7
    stamps = [p.stat().st_mtime_ns for p in kept]
    again = bench(*given, "--only", "optfs", "--at-least", "optfs_recall=1.1")
    assert again.exit_code == 1
    assert "missed: optfs_recall is" in again.stderr
    assert json.loads(again.stdout)["figures"]["optfs_recall"] == figures["optfs_recall"]
    assert [p.stat().st_mtime_ns for p in kept] == stamps


def test_an_unknown_part_is_refused():
    with pytest.raises(ConfigError, match="no part 'order'.*orders"):
        bench("--only", "order")


def test_every_arm_is_a_configuration_of_its_own():
    for part in PARTS.values():
        configs = [part.config(arm, 5, None) for arm in part.arms]
        assert all(config.seed == config.data.options["seed"] == 5 for config in configs)
        assert len({config.model_dump_json() for config in configs}) == len(configs)
        assert part.config(next(iter(part.arms)), 5, 1234).data.options["rows"] == 1234


def test_paired_figures_are_differences_seed_by_seed():
    report = BenchReport("", [])
    part = Part({"none": {}, "gate": {}}, lambda config, data, trained: {}, paired=("auc",))
    found = {"none": [{"auc": 0.5}, {"auc": 0.7}], "gate": [{"auc": 0.6}, {"auc": 0.8}]}
    truth_bench._tell(report, "shortcuts", part, found)
    figures = report.figures
    assert figures["shortcuts_auc_gate"] == pytest.approx(0.7)
    for end in ("", "_low", "_high"):  # both worlds agree on the gain, though not on the level
        assert figures[f"shortcuts_auc_gain_gate{end}"] == pytest.approx(0.1)
    assert "shortcuts_auc_gain_none" not in figures


def test_orders_are_summed_up_over_all_worlds():
    report = BenchReport("", [])
    found = {
        "order_2": [{"told": 1.0, "opening": 0.3, "absent": 0.1}, {"told": 1.0, "opening": 0.2, "absent": 0.1}],
        "order_3": [{"told": 0.0, "opening": 0.1, "absent": 0.15}, {"told": 1.0, "opening": 0.3, "absent": 0.0}],
    }
    part = Part({"order_2": {}, "order_3": {}}, lambda config, data, trained: {})
    truth_bench._tell(report, "orders", part, found)
    assert report.figures["told_orders"] == 0.75
    assert report.figures["opening_margin"] == pytest.approx(-0.05)
