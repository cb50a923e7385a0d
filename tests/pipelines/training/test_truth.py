from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from pipelines.datasets.base import open_data
from pipelines.datasets.config import DataConfig
from pipelines.evaluation.metrics import evaluate
from pipelines.features.prepare import prepare
from pipelines.training.truth import best_possible

OPTIONS = {"rows": 6000, "users": 60, "items": 50, "days": 4, "conversion_rate": 0.4}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("truth")
    raw = open_data(DataConfig(source="click_world", path=folder / "world", options=OPTIONS))
    return prepare(raw, None, workdir=folder, seed=1, progress=False)


def test_every_task_whose_truth_is_known_has_its_best(data):
    found = best_possible(data, "test")
    frame = data.frame("test").collect()
    clicked = frame.filter(pl.col("__label__") == 1)
    for own, task, label, truth in (
        (frame, "", "__label__", "true_probability"),
        (clicked, "_conversion", "__label_conversion__", "true_conversion"),
    ):
        expected = evaluate(*(own[name].to_numpy() for name in (label, truth, "__user__")))
        assert {name: found[f"{name}{task}"] for name in expected} == pytest.approx(expected)
    assert np.isfinite(list(found.values())).all()
    assert 0.6 < found["auc_conversion"] < 0.95


def test_without_a_truth_there_is_no_best(world):
    assert best_possible(world, "test") == {}
