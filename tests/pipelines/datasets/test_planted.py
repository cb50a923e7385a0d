from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from ctr_models.errors import ConfigError, DataError
from pipelines.datasets.base import DATASETS, check_options, open_data
from pipelines.datasets.config import DataConfig
from pipelines.datasets.planted import LABEL, TRUTH, PlantedWorld, signs
from pipelines.features.prepare import prepare
from pipelines.training.truth import best_possible

WORLDS = sorted(name for name in DATASETS if name.startswith("planted_"))


def opened(source, **options):
    return open_data(DataConfig(source=source, options={"rows": 2000, **options}))


def rows_of(source, **options):
    return opened(source, **options).parts["all"].frame.collect()


@pytest.mark.parametrize("source", WORLDS)
def test_a_world_is_decided_by_its_options(source):
    one, again, other = (opened(source, seed=seed) for seed in (1, 1, 2))
    frames = [data.parts["all"].frame.collect() for data in (one, again, other)]
    assert frames[0].equals(frames[1])
    assert not frames[0].equals(frames[2])
    assert one.fingerprint == again.fingerprint != other.fingerprint
    assert len({opened(name).fingerprint for name in WORLDS}) == len(WORLDS) == 4


@pytest.mark.parametrize("source", WORLDS)
def test_clicks_are_drawn_from_the_probability_that_is_kept(source):
    frame = rows_of(source, rows=40_000)
    p, click = frame[TRUTH].to_numpy(), frame[LABEL].to_numpy()
    assert ((p > 0) & (p < 1)).all()
    assert np.array_equal(p, np.round(p, 6))
    error = np.sqrt((p * (1 - p)).sum())
    assert abs(click.sum() - p.sum()) < 4 * error
    high = p > np.median(p)
    assert abs(click[high].sum() - p[high].sum()) < 4 * error


@pytest.mark.parametrize("source", WORLDS)
def test_a_world_is_encoded_and_its_best_possible_is_known(source, tmp_path):
    data = prepare(opened(source), None, workdir=tmp_path, seed=1, progress=False)
    assert data.truth == TRUTH
    assert not {TRUTH, "population", "easy_disagrees", "user"} & {f.name for f in data.schema.fields}
    assert 0.5 < best_possible(data, "test")["auc"] < 1


@pytest.mark.parametrize("source", WORLDS)
def test_a_world_reads_no_files(source):
    with pytest.raises(DataError, match=f"source {source} makes its rows and reads no files"):
        open_data(DataConfig(source=source, path=Path("somewhere")))


@pytest.mark.parametrize(
    ("source", "options", "said"),
    [
        ("planted_values", {"fields": 0, "pairs": 0}, "needs fields or pairs"),
        ("planted_values", {"useless": 0.99, "values": 10}, "leaves none of one kind"),
        ("planted_values", {"rows": 5}, "rows"),
        ("planted_orders", {"orders": [2, 9]}, r"orders are 1 to 8.*found \[9\]"),
        ("planted_orders", {"orders": []}, "found none"),
        ("planted_orders", {"orders": [2, 2]}, "stands twice"),
        ("planted_orders", {"values": 3}, "multiple of 2"),
        ("planted_shortcut", {"values": 5}, "multiple of 2"),
        ("planted_populations", {"segments": 3}, "segments must be at least 4"),
        ("planted_populations", {"told_by": "history", "items": 3}, "items must be at least 4"),
        ("planted_populations", {"told_by": "stars"}, "told_by"),
    ],
)
def test_options_that_make_no_world_are_refused(source, options, said):
    with pytest.raises(ConfigError, match=said):
        check_options(DataConfig(source=source, options=options))


def test_signs_are_as_often_minus_one_as_one():
    drawn = signs(np.random.default_rng(0), 10)
    assert drawn.sum() == 0
    assert set(drawn) == {-1.0, 1.0}


def test_a_world_of_ones_own_says_only_its_rows_and_features():
    class Coin(PlantedWorld):
        name = "coin"

        def rows(self, make):
            side = make.integers(0, 2, self.options.rows)
            return pl.DataFrame({"side": side}), np.where(side == 1, 1.0, -1.0)

    frame = Coin(Coin.Options(rows=100)).frame()
    assert set(frame.filter(pl.col("side") == 1)[TRUTH]) == {0.731059}
