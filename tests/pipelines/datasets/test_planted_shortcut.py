from __future__ import annotations

import polars as pl
import pytest

from pipelines.datasets.planted import LABEL, TRUTH
from pipelines.datasets.planted_shortcut import DISAGREES, PlantedShortcut, PlantedShortcutOptions
from pipelines.evaluation.metrics import auc


@pytest.fixture(scope="module")
def world():
    return PlantedShortcut(PlantedShortcutOptions(rows=60_000, values=2, hard=2, idle=1))


def rate_by(frame, *fields):
    return frame.group_by(fields).agg(pl.col(TRUTH).mean())[TRUTH]


def test_the_easy_field_tells_by_itself_and_a_hard_one_does_not(world):
    frame = world.frame()
    assert rate_by(frame, "easy").max() > 0.6
    for field in ("hard_00", "hard_01", "idle_00"):
        assert (rate_by(frame, field) - 0.5).abs().max() < 0.02


def test_the_hard_feature_tells_more_than_the_easy_one(world):
    frame = world.frame()
    assert rate_by(frame, "hard_00", "hard_01").max() > rate_by(frame, "easy").max() + 0.1


def test_who_goes_by_the_easy_field_is_wrong_where_it_disagrees(world):
    frame = world.frame().filter(DISAGREES)
    rate = frame.group_by("easy").agg(pl.col(TRUTH).first(), pl.col(TRUTH).n_unique().alias("kinds"))
    assert rate["kinds"].to_list() == [1, 1]
    assert sorted(rate[TRUTH]) == [0.268941, 0.731059]
    up = max(world.signs()["easy"])
    raised = [f"v{n:03d}" for n, s in enumerate(world.signs()["easy"]) if s == up]
    by_easy = frame["easy"].is_in(raised).cast(pl.Float64).to_numpy()
    assert auc(frame[LABEL].to_numpy(), by_easy) < 0.35
    assert auc(frame[LABEL].to_numpy(), frame[TRUTH].to_numpy()) > 0.65
