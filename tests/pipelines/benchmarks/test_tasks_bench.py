from __future__ import annotations

import json

import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner

from pipelines.benchmarks import tasks_bench
from pipelines.commands.bench import benchmarks


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("tasks")


@pytest.fixture(scope="module")
def data(work):
    return tasks_bench.encoded(2000, 0.4, work)


def test_every_arm_is_judged_by_the_same_rows(data):
    rows = {name: {s: one.frame(s).collect() for s in ("train", "valid", "test")} for name, one in data.items()}
    for split in ("train", "valid", "test"):
        both, click, conversion = (rows[name][split] for name in ("both", "click", "conversion"))
        assert both.drop("__label_conversion__").equals(click)
        clicked = both.filter(pl.col("__label__") == 1)
        assert np.array_equal(clicked["__label_conversion__"], conversion["__label__"])
        assert np.array_equal(clicked["__user__"], conversion["__user__"])
        lengths = (one["history"].list.len() for one in (clicked, conversion))
        assert np.array_equal(*lengths)  # clicks, also where the label is the conversion
    assert data["conversion"].truth == "true_conversion"
    assert (data["both"].schema.tasks, data["click"].schema.tasks) == (("conversion",), ())


def test_both_tasks_of_both_arms_are_reported_and_kept(work, data):
    assert benchmarks()["tasks"] == "pipelines.benchmarks.tasks_bench"
    from pipelines.cli import build_app

    out = work / "figures.json"
    small = ["--rows", "2000", "--rate", "0.4", "--seeds", "1", "--epochs", "1", "--workdir", str(work)]
    done = CliRunner().invoke(build_app(), ["bench", "tasks", *small, "--json", str(out)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    figures = json.loads(out.read_text())["figures"]
    for task in ("click", "conversion"):
        assert figures[f"best_auc_{task}"] > max(figures[f"auc_{task}_one_model_each"], figures[f"auc_{task}_mmoe"])
        difference = figures[f"auc_{task}_mmoe"] - figures[f"auc_{task}_one_model_each"]
        assert figures[f"auc_{task}_mmoe_difference"] == pytest.approx(difference)
        assert figures[f"auc_{task}_mmoe_low"] < difference < figures[f"auc_{task}_mmoe_high"]
    assert len(list(work.glob("*/**/finished/result.json"))) == 3
    again = ["bench", "tasks", *small, "--at-least", "auc_click_mmoe=0.99"]
    missed = CliRunner().invoke(build_app(), again)
    assert missed.exit_code == 1
    assert "auc_click_mmoe is" in missed.output
