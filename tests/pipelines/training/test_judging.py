"""The valid rows after each phase of a recipe."""

from __future__ import annotations

import pytest

from pipelines.training.judging import judge_best, judge_epoch, judged_phases
from pipelines.training.recipes import RecipeConfig
from pipelines.training.trainer import train

BEST = {"epoch": 2, "valid_auc": 0.75, "valid_logloss": 0.5, "valid_ece": 0.01, "valid_gauc": 0.7, "lr": 0.1}


def test_an_epoch_s_valid_metrics_by_their_plain_names():
    assert judge_epoch(BEST) == {"auc": 0.75, "logloss": 0.5, "ece": 0.01, "gauc": 0.7}
    assert judge_best({"history": [{"epoch": 1, "valid_auc": 0.5}, BEST], "best_epoch": 2}) == judge_epoch(BEST)


def test_phases_that_judged_no_model_are_left_out():
    report = judged_phases(
        {"full": {"valid": judge_epoch(BEST)}, "choose": {"dims": {}}, "retrain": {"valid": {"auc": 0.5}}}
    )
    assert report["rows"] == [
        {"phase": "full", "auc": 0.75, "logloss": 0.5, "ece": 0.01},
        {"phase": "retrain", "auc": 0.5, "logloss": "", "ece": ""},
    ]
    assert report["totals"] == {
        "phases/full/auc": 0.75,
        "phases/full/logloss": 0.5,
        "phases/full/ece": 0.01,
        "phases/retrain/auc": 0.5,
    }


def test_one_phase_is_no_report(config, world, tmp_path):
    assert judged_phases({"fit": {"valid": judge_epoch(BEST)}}) is None
    assert train(config(epochs=1), world, run_dir=tmp_path / "run", progress=False).reports == []


def test_the_last_phase_is_what_the_run_reports(config, world, tmp_path):
    settings = config(epochs=1).model_copy(update={"recipe": RecipeConfig(name="fdo", options={"keep": 0.5})})
    result = train(settings, world, run_dir=tmp_path / "run", progress=False)
    rows = {row["phase"]: row for row in result.reports[-1]["rows"]}
    assert list(rows) == ["full", "choose", "retrain"]
    for name in ("auc", "logloss", "ece"):
        assert rows["retrain"][name] == pytest.approx(result.metrics[f"valid_{name}"])
