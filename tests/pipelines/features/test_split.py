"""Splits: shares, ties, and words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from ctr_models.errors import DataError
from pipelines.datasets.config import SplitConfig
from pipelines.features.spec import FeatureSpec
from pipelines.features.split import assign
from pipelines.features.stage import Source, stage

SPEC = FeatureSpec.model_validate(
    {"label": "y", "timestamp": "t", "columns": [{"name": "x", "kind": "categorical"}]}
)


def divided(folder: Path, config: SplitConfig, seed: int = 1, **columns: Any) -> np.ndarray:
    rows = len(next(iter(columns.values())))
    frame = pl.LazyFrame({"y": [0] * rows, "t": range(rows), "x": ["a"] * rows} | columns)
    source = Source("all", frame, Path("log.parquet"))
    keep = [config.column] if config.column else []
    return assign(stage([source], SPEC, folder, keep=keep, timed=True), config, seed, [source])


def test_time_cuts_oldest_to_newest(tmp_path: Path) -> None:
    times = np.random.default_rng(0).permutation(1000)
    out = divided(tmp_path, SplitConfig(by="time", train=0.7, valid=0.2), t=times)
    assert np.bincount(out).tolist() == [700, 200, 100]
    assert times[out == 0].max() < times[out == 1].min()
    assert times[out == 1].max() < times[out == 2].min()


def test_a_moment_is_never_divided(tmp_path: Path) -> None:
    times = np.repeat(np.arange(10), 37)
    out = divided(tmp_path, SplitConfig(by="time", train=0.55, valid=0.2), t=times)
    assert all(len(set(out[times == t])) == 1 for t in range(10))


def test_random_meets_its_shares_and_its_seed(tmp_path: Path) -> None:
    config = SplitConfig(by="random", train=0.6, valid=0.3)
    out = divided(tmp_path, config, x=["a"] * 20_000)
    np.testing.assert_allclose(np.bincount(out) / 20_000, [0.6, 0.3, 0.1], atol=0.015)
    np.testing.assert_array_equal(out, divided(tmp_path, config, x=["b"] * 20_000))
    assert (out != divided(tmp_path, config, seed=2, x=["a"] * 20_000)).any()
    # The same rows fall the same way however many follow.
    np.testing.assert_array_equal(out[:500], divided(tmp_path, config, x=["a"] * 500))


def test_a_column_says_it(tmp_path: Path) -> None:
    words = ["test", "train", "valid", "train"]
    assert divided(tmp_path, SplitConfig(by="column", column="part"), part=words).tolist() == [2, 0, 1, 0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "valid", "tset"], "log.parquet: column part, row 3: 'tset' is no split. did you mean 'test'?"),
        (["train", "valid", None], "log.parquet: column part, row 3: None is no split."),
        (["train", "valid", "valid"], "log.parquet: no row is left for test when split by column."),
    ],
)
def test_a_column_that_says_something_else_is_refused(tmp_path: Path, words: list[Any], message: str) -> None:
    with pytest.raises(DataError) as caught:
        divided(tmp_path, SplitConfig(by="column", column="part"), part=words)
    assert message in str(caught.value)
