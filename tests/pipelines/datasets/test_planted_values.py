from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from pipelines.datasets.planted import TRUTH
from pipelines.datasets.planted_values import PlantedValues, PlantedValuesOptions


@pytest.fixture(scope="module")
def world():
    return PlantedValues(PlantedValuesOptions(rows=40_000, fields=2, pairs=1, values=8, seed=3))


def test_half_of_the_values_are_useless_and_the_others_balance(world):
    useless = world.useless_values()
    assert list(useless) == ["field_00", "field_01", "pair_00_a", "pair_00_b"]
    for field, effect in world.effects().items():
        assert len(useless[field]) == 4
        assert {f"v{n:03d}" for n in np.flatnonzero(effect == 0)} == set(useless[field])
        assert effect.sum() == pytest.approx(0)
        assert np.abs(effect[effect != 0]).min() >= 0.3
    assert set(np.unique(world.effects()["pair_00_a"])) == {-1.0, 0.0, 1.0}


def test_a_useless_value_has_no_effect_on_the_probability_and_a_useful_one_has(world):
    """Of rows that agree in all other fields, those with a useless value have one probability."""
    frame, useless = world.frame(), world.useless_values()
    for field, values in useless.items():
        others = [name for name in useless if name != field]
        dull = frame.filter(pl.col(field).is_in(values))
        assert dull.group_by(others).agg(pl.col(TRUTH).n_unique())[TRUTH].max() == 1
        lively = frame.filter(~pl.col(field).is_in(values))
        assert lively.group_by(others).agg(pl.col(TRUTH).n_unique())[TRUTH].max() > 1


def test_no_value_of_a_pair_tells_anything_by_itself():
    world = PlantedValues(PlantedValuesOptions(rows=100_000, fields=0, pairs=1, values=8, strength=2.0))
    frame = world.frame()
    for field in ("pair_00_a", "pair_00_b"):
        means = frame.group_by(field).agg(pl.col(TRUTH).mean())[TRUTH]
        assert (means - 0.5).abs().max() < 0.02
    assert frame[TRUTH].min() == 0.119203
    assert frame[TRUTH].max() == 0.880797


def test_the_truth_does_not_depend_on_how_many_rows_there_are():
    one, other = (PlantedValues(PlantedValuesOptions(rows=rows)).useless_values() for rows in (10, 20))
    assert one == other
