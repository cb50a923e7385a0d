"""Dropping values: smaller tables, the same rows, and batch = request still."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.datasets.base import RawData, RawPart
from pipelines.datasets.config import SplitConfig
from pipelines.features.dropping import drop_values
from pipelines.features.online import OnlineEncoder
from pipelines.features.prepare import EncodedData, prepare
from pipelines.features.spec import FeatureSpec
from pipelines.features.state import FeatureState
from pipelines.features.transform import encoded_rows, transform
from tests.pipelines.features.every_kind import COLUMNS

SPEC = FeatureSpec.model_validate({"label": "y", "user": "ad", "columns": COLUMNS})
ROWS = 60


def log(seed: int = 0, rows: int = ROWS) -> pl.DataFrame:
    random = np.random.default_rng(seed)

    def some(values: list[Any]) -> list[Any]:
        return [values[i] for i in random.integers(0, len(values), rows)]

    ads = ["a", "b", "c", "d", "e", None]
    return pl.DataFrame(
        {
            "y": random.integers(0, 2, rows),
            "ad": some(ads),
            "city": some(["rome", "oslo", "lima", "bern", None]),
            "price": some([1.0, 2.0, 3.5, 9.0, None]),
            "age": some([0.0, 3.0, 40.0, -7.0, None]),
            "score": random.normal(size=rows),
            "tags": some(["x|y", "y", "", "z|x|y", None]),
            "seen": [some(ads[:5])[: random.integers(0, 4)] for _ in range(rows)],
        }
    )


def fitted() -> FeatureState:
    return FeatureState.fit(SPEC, log().lazy(), source="log")


def choose(state: FeatureState, seed: int, share: float = 0.5) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {name: random.random(table.rows) < share for name, table in state.tables.items()}


@given(st.integers(0, 2**31), st.floats(0, 1))
@settings(max_examples=25, deadline=None)
def test_a_dropped_value_has_row_2_and_the_others_their_own(seed: int, share: float) -> None:
    state = fitted()
    dropped = choose(state, seed, share)
    small = state.dropping(dropped)
    raw = log(seed=1)
    before = transform(state, raw.lazy(), source="log").collect()
    after = transform(small, raw.lazy(), source="log").collect()
    for f in (*state.schema().sparse, *state.schema().sequences):
        old, new = (frame[f.name].explode().drop_nulls().to_numpy() for frame in (before, after))
        gone = dropped[f.table] & (np.arange(f.rows) > 1)
        assert (new[old <= 1] == old[old <= 1]).all()  # missing and unknown stay what they are
        if gone.any():
            assert ((new == 2) == gone[old]).all()
            kept = 1 + (~gone).sum()
            assert small.tables[f.table].rows == kept
        pairs = {(o, n) for o, n in zip(old.tolist(), new.tolist(), strict=True) if not gone[o]}
        assert len({n for _, n in pairs}) == len(pairs)


@given(st.integers(0, 2**31), st.floats(0, 1))
@settings(max_examples=25, deadline=None)
def test_batch_and_request_stay_equal(seed: int, share: float) -> None:
    state = fitted()
    small = state.dropping(choose(state, seed, share))
    raw = log(seed=2, rows=12).with_columns(ad=pl.Series(["a", "new", None] * 4)).drop("y")
    batch = encoded_rows(transform(small, raw.lazy(), source="log").collect(), small.schema())
    request = OnlineEncoder(small).encode({}, {}, raw.to_dicts())
    np.testing.assert_array_equal(batch.single, request.single)
    np.testing.assert_array_equal(batch.dense, request.dense)
    for name, ragged in batch.ragged.items():
        np.testing.assert_array_equal(ragged.values, request.ragged[name].values)
        np.testing.assert_array_equal(ragged.offsets, request.ragged[name].offsets)


def test_counts_add_up() -> None:
    state = fitted()
    dropped = choose(state, 5)
    small = state.dropping(dropped)
    for name, table in state.tables.items():
        before, after = state.counts(name), small.counts(name)
        assert after.sum() == before.sum()
        gone = dropped[name].copy()
        gone[:2] = False
        if gone.any():
            assert after[2] == before[gone].sum()
        assert len(after) == small.tables[name].rows <= table.rows


def test_it_survives_saving(tmp_path) -> None:
    state = fitted()
    small = state.dropping(choose(state, 3))
    small.save(tmp_path / "state")
    again = FeatureState.load(tmp_path / "state")
    assert again.hash == small.hash != state.hash
    assert again.schema() == small.schema()
    raw = log(seed=4).lazy()
    assert transform(again, raw, source="log").collect().equals(transform(small, raw, source="log").collect())


def test_without_a_dropped_value_nothing_changes() -> None:
    state = fitted()
    first_two = {name: np.arange(table.rows) < 2 for name, table in state.tables.items()}
    assert state.dropping(first_two).hash == state.hash


def test_a_later_log_brings_rows_of_its_own_and_the_dropped_stay_dropped() -> None:
    spec = FeatureSpec.model_validate({"label": "y", "columns": [{"name": "ad", "kind": "categorical"}]})
    state = FeatureState.fit(spec, pl.LazyFrame({"y": [0] * 4, "ad": ["a", "a", "b", "c"]}), source="log")
    small = state.dropping({"ad": np.array([False, False, True, False, False])})  # a
    grown = small.merge(FeatureState.count(spec, pl.LazyFrame({"y": [0] * 3, "ad": ["a", "d", "e"]}), source="log"))
    values = pl.LazyFrame({"ad": ["a", "b", "c", "d", "e", "f", None]})
    encoded = transform(grown, values, source="log").collect()["ad"].to_list()
    assert encoded == [2, 3, 4, 5, 6, 1, 0]
    assert grown.tables["ad"].rows == 7


def test_dropping_twice_is_dropping_both() -> None:
    spec = FeatureSpec.model_validate({"label": "y", "columns": [{"name": "ad", "kind": "categorical"}]})
    state = FeatureState.fit(spec, pl.LazyFrame({"y": [0] * 4, "ad": ["a", "b", "c", "d"]}), source="log")
    once = state.dropping({"ad": np.array([0, 0, 1, 0, 0, 0], dtype=bool)})  # a; b, c, d move to 3, 4, 5
    twice = once.dropping({"ad": np.array([0, 0, 1, 0, 1, 0], dtype=bool)})  # and c
    encoded = transform(twice, pl.LazyFrame({"ad": ["a", "b", "c", "d"]}), source="log").collect()["ad"].to_list()
    assert encoded == [2, 3, 2, 4]


@pytest.fixture
def data(tmp_path) -> EncodedData:
    parts = {
        name: RawPart(log(seed).lazy(), tmp_path / name) for seed, name in enumerate(("train", "valid", "test"))
    }
    return prepare(
        RawData(parts, SplitConfig(by="given"), None, "abc"), SPEC, workdir=tmp_path, seed=1, progress=False
    )


def test_encoded_files_are_those_that_the_smaller_state_makes(data, tmp_path) -> None:
    dropped = choose(data.state, 7)
    small = drop_values(data, dropped, tmp_path / "small")
    assert small.state.hash == data.state.dropping(dropped).hash
    assert small.schema == small.state.schema()
    for seed, split in enumerate(("train", "valid", "test")):
        assert small.rows(split) == data.rows(split) == ROWS
        expected = transform(small.state, log(seed).lazy(), source="log").collect().drop("__row__")
        found, before = (d.frame(split).collect() for d in (small, data))
        assert found.drop("__row__").equals(expected)
        assert found["__row__"].equals(before["__row__"])
        assert found.schema == before.schema
