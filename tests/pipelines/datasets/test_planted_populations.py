from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from pipelines.datasets.planted import TRUTH
from pipelines.datasets.planted_populations import POPULATION, PlantedPopulations, PlantedPopulationsOptions


def made(**options):
    return PlantedPopulations(PlantedPopulationsOptions(rows=4000, users=200, **options))


def number(column: pl.Series) -> np.ndarray:
    return column.str.slice(1).cast(pl.Int64).to_numpy()


def test_a_row_clicks_as_its_population_does():
    world = made(fields=2)
    frame, taste = world.frame(), world.tastes()
    population = frame[POPULATION].to_numpy()
    met = [taste[population, f, number(frame[f"field_{f:02d}"])] for f in range(2)]
    expected = 1 / (1 + np.exp(-2.0 / 2**0.5 * sum(met)))
    assert frame[TRUTH].to_numpy() == pytest.approx(expected, abs=1e-6)
    assert taste.mean(2) == pytest.approx(np.zeros((4, 2)), abs=1e-12)
    assert taste.std(2) == pytest.approx(np.ones((4, 2)))


def test_a_user_has_one_population_and_one_past():
    for told_by, column in (("features", "segment"), ("history", "history")):
        frame = made(told_by=told_by).frame()
        by_user = frame.group_by("user").agg(pl.col(POPULATION, column).n_unique())
        assert by_user[POPULATION].max() == by_user[column].max() == 1
        assert frame[POPULATION].n_unique() == 4


def test_a_segment_belongs_to_one_population():
    world = made()
    frame = world.frame()
    assert np.array_equal(world.owners(40)[number(frame["segment"])], frame[POPULATION].to_numpy())


def test_histories_are_typical_of_the_population():
    world = made(told_by="history", typical=0.6, history=20)
    flat = world.frame().select(POPULATION, "history").explode("history")
    own = world.owners(80)[number(flat["history"])] == flat[POPULATION].to_numpy()
    assert own.mean() == pytest.approx(0.6 + 0.4 / 4, abs=0.03)


def test_the_candidate_tells_nothing_of_the_population():
    frame = made(told_by="history").frame()
    own = PlantedPopulations(PlantedPopulationsOptions()).owners(80)[number(frame["item"])]
    assert (own == frame[POPULATION].to_numpy()).mean() == pytest.approx(0.25, abs=0.04)
