"""Numbers and values at the edges: ties, constants, outside the training range, NaN, infinities."""

from __future__ import annotations

import math

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.features.encoders import Lookup, flat_lists, log_ids, quantile_ids, standardise, user_ids
from pipelines.features.spec import Column, LogBucket, Standard
from pipelines.features.summaries import Moments, Quantiles


def edges(values: list[float], buckets: int) -> np.ndarray:
    return Quantiles.of(np.array(values, dtype=np.float64)).edges(buckets)


def test_quantiles_hold_equal_shares() -> None:
    x = np.random.default_rng(1).normal(size=10_000)
    ids = quantile_ids(x, edges(x.tolist(), 8))
    assert np.bincount(ids)[2:].tolist() == [1250] * 8


def test_a_tie_is_never_divided() -> None:
    cut = edges([1, 1, 1, 1, 1, 1, 2, 3], 4)
    assert cut.tolist() == [2.0]
    assert quantile_ids(np.array([1.0, 2.0, 3.0]), cut).tolist() == [2, 3, 3]


def test_a_constant_column_has_one_bucket() -> None:
    cut = edges([7.0] * 50, 10)
    assert len(cut) == 0
    assert quantile_ids(np.array([7.0, -1e9, np.inf, np.nan]), cut).tolist() == [2, 2, 2, 0]


def test_an_empty_column_has_no_edges() -> None:
    assert edges([math.nan, math.inf], 4).tolist() == []


def test_values_outside_the_training_range_fall_in_the_outer_buckets() -> None:
    cut = edges([float(i) for i in range(100)], 4)
    assert quantile_ids(np.array([-1e300, -np.inf, 1e300, np.inf]), cut).tolist() == [2, 2, 5, 5]


@settings(max_examples=100, deadline=None)
@given(x=st.lists(st.floats(-1e12, 1e12), min_size=1, max_size=50), buckets=st.integers(2, 12))
def test_the_quantile_id_rises_with_the_number(x: list[float], buckets: int) -> None:
    ids = quantile_ids(np.sort(np.array(x)), edges(x, buckets))
    assert (np.diff(ids) >= 0).all()
    assert ids.min() >= 2
    assert ids.max() < 2 + buckets


def test_log_buckets_are_symmetric_and_bounded() -> None:
    encoding = LogBucket(base=2, buckets=6)
    x = np.array([0.0, -0.0, 0.99, 1.0, 2.99, 3.0, 1e300, np.inf])
    up, down = log_ids(x, encoding), log_ids(-x, encoding)
    assert up.tolist() == [8, 8, 8, 9, 9, 10, 14, 14]
    assert (up - 8).tolist() == (8 - down).tolist()
    assert log_ids(np.array([np.nan]), encoding).tolist() == [0]


@settings(max_examples=200, deadline=None)
@given(
    x=st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=1, max_size=20),
    log=st.booleans(),
    clip=st.sampled_from([None, 0.5, 10.0]),
)
def test_a_standardised_number_is_always_finite(x: list[float], log: bool, clip: float | None) -> None:
    from pipelines.features.encoders import prepared

    encoding = Standard(log=log, clip=clip)
    numbers = np.array(x)
    with np.errstate(all="raise", under="ignore"):
        moments = Moments.of(prepared(numbers, encoding))
        out = standardise(numbers, encoding, moments)
    assert out.dtype == np.float32
    assert np.isfinite(out).all()
    assert (out[np.isnan(numbers)] == 0).all()
    if clip is not None:
        assert (np.abs(out) <= np.float32(clip)).all()


def test_a_constant_column_is_centred_not_blown_up() -> None:
    constant = np.full(1000, 0.1)
    out = standardise(np.array([0.1, 0.2]), Standard(), Moments.of(constant))
    np.testing.assert_allclose(out, [0.0, 0.1], atol=1e-6)


@pytest.mark.parametrize("dtype", [pl.Int64, pl.Float64])
@pytest.mark.parametrize("spread", [1, 10**12])
def test_numbers_are_found_near_and_far(dtype: type[pl.DataType], spread: int) -> None:
    values = pl.Series([i * spread for i in (5, -3, 0, 40)], dtype=dtype)
    lookup = Lookup(values, np.array([2, 3, 4, 5], dtype=np.int32))
    asked = pl.Series([40 * spread, -3 * spread, 1, None, 10**15, -(10**15)], dtype=dtype)
    assert lookup.ids(asked).tolist() == [5, 3, 1, 0, 1, 1]


def test_an_empty_vocabulary_knows_nothing() -> None:
    for dtype in (pl.String, pl.Int64, pl.Float64):
        lookup = Lookup(pl.Series([], dtype=dtype), np.empty(0, dtype=np.int32))
        assert lookup.ids(pl.Series([None, "1"]).cast(dtype)).tolist() == [0, 1]


def test_texts_are_found_again_after_strangers() -> None:
    lookup = Lookup(pl.Series(["b", "a"]), np.array([2, 3], dtype=np.int32))
    for _ in range(3):
        assert lookup.ids(pl.Series(["x", "a", "y", "b", "z"])).tolist() == [1, 3, 1, 2, 1]


def column(**options: object) -> Column:
    return Column.model_validate({"name": "x", **options})


@pytest.mark.parametrize(
    ("values", "options", "elements", "lengths"),
    [
        ([["a", None, "b"], None, [], [""]], {"kind": "multi"}, ["a", "b"], [2, 0, 0, 0]),
        ([["a", "b", "c"]], {"kind": "multi", "max_length": 2}, ["a", "b"], [2]),
        ([["a", "b", "c"]], {"kind": "sequence", "max_length": 2}, ["b", "c"], [2]),
        ([[None, "a", "", "b"]], {"kind": "multi", "max_length": 2}, ["a", "b"], [2]),
        (["a|b", "", None, "|c"], {"kind": "multi", "separator": "|"}, ["a", "b", "c"], [2, 0, 0, 1]),
        ([[1.0, math.nan]], {"kind": "multi"}, [1.0], [1]),
    ],
)
def test_lists_are_cleaned_then_cut(
    values: list, options: dict[str, object], elements: list, lengths: list[int]
) -> None:
    found, sizes = flat_lists(pl.Series("x", values), column(**options))
    assert found.to_list() == elements
    assert sizes.tolist() == lengths


def test_text_without_a_separator_is_no_list() -> None:
    with pytest.raises(ValueError, match="expected a list"):
        flat_lists(pl.Series(["a"]), column(kind="multi"))


def test_nobody_is_0_and_everybody_else_is_not() -> None:
    ids = user_ids(pl.Series(["a", None, "b", "a"]))
    assert ids[0] == ids[3] != ids[2]
    assert ids[1] == 0
    assert ids[0] != 0
