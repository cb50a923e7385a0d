from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from pipelines.datasets.click_world import ClickWorldOptions, World
from pipelines.datasets.click_world_conversions import SHARED, WEIGHTS
from pipelines.evaluation.metrics import auc


@pytest.fixture(scope="module")
def world() -> World:
    return World(ClickWorldOptions(rows=120_000, days=4, conversion_rate=0.3))


@pytest.fixture(scope="module")
def clicked(world: World) -> pl.DataFrame:
    frame = pl.concat([world.day(day) for day in range(4)])
    assert frame.filter(pl.col("click") == 0)["conversion"].is_null().all()
    clicked = frame.filter(pl.col("click") == 1)
    assert clicked["conversion"].null_count() == 0
    return clicked


def test_probabilities_are_calibrated(clicked: pl.DataFrame) -> None:
    truth, conversion = clicked["true_conversion"].to_numpy(), clicked["conversion"].to_numpy()
    assert conversion.mean() == pytest.approx(0.3, abs=0.01)
    for low, high in ((0, 0.15), (0.15, 0.3), (0.3, 0.5), (0.5, 1.0)):
        inside = (truth >= low) & (truth < high)
        error = (truth[inside] * (1 - truth[inside])).sum() ** 0.5 / inside.sum()
        assert abs(conversion[inside].mean() - truth[inside].mean()) < 4 * error


def test_it_shares_terms_with_the_click_and_has_its_own(world: World, clicked: pl.DataFrame) -> None:
    assert world.conversions is not None
    at = world._impressions(world._generator(9), 50_000, 5)
    clicks = world._terms(at)
    terms = world.conversions.terms(at, clicks)
    assert list(terms) == list(WEIGHTS)
    for name, term in terms.items():
        assert term.std() * world.conversions.logit.scale[name] == pytest.approx(WEIGHTS[name], rel=0.2), name
        assert (name in clicks and np.array_equal(term, clicks[name])) == (name in SHARED)
    # Related, and far from the same: the click's probability orders conversions only somewhat.
    label, of_click = clicked["conversion"].to_numpy(), clicked["true_probability"].to_numpy()
    assert 0.53 < auc(label, of_click) < auc(label, clicked["true_conversion"].to_numpy()) - 0.1


def test_a_day_alone_is_the_day_of_the_whole(world: World) -> None:
    assert World(world.options).day(3).equals(world.day(3))
