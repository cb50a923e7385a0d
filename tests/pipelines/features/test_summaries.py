"""Summaries that merge."""

from __future__ import annotations

import numpy as np
import polars as pl
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.features.summaries import Counter, Moments, Quantiles

NUMBERS = st.lists(st.floats(-1e6, 1e6), max_size=30)


@settings(max_examples=200, deadline=None)
@given(left=NUMBERS, right=NUMBERS)
def test_moments_of_parts_are_those_of_the_whole(left: list[float], right: list[float]) -> None:
    merged = Moments.of(np.array(left)).merge(Moments.of(np.array(right)))
    whole = Moments.of(np.array(left + right))
    assert merged.count == whole.count
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(merged.squares, whole.squares, rtol=1e-6, atol=1e-3)


@settings(max_examples=100, deadline=None)
@given(x=st.lists(st.tuples(st.floats(-100, 100), st.integers(1, 5)), min_size=1, max_size=20))
def test_weights_are_repetitions(x: list[tuple[float, int]]) -> None:
    values, weights = np.array([v for v, _ in x]), np.array([w for _, w in x])
    weighted, repeated = Moments.of(values, weights), Moments.of(np.repeat(values, weights))
    assert weighted.count == repeated.count
    np.testing.assert_allclose(weighted.mean, repeated.mean, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(weighted.squares, repeated.squares, rtol=1e-6, atol=1e-6)
    few, many = Quantiles.of(values, weights), Quantiles.of(np.repeat(values, weights))
    np.testing.assert_array_equal(few.values, many.values)
    np.testing.assert_array_equal(few.weights, many.weights)


@settings(max_examples=100, deadline=None)
@given(left=NUMBERS, right=NUMBERS, buckets=st.integers(2, 9))
def test_quantiles_of_parts_are_those_of_the_whole(left: list[float], right: list[float], buckets: int) -> None:
    merged = Quantiles.of(np.array(left)).merge(Quantiles.of(np.array(right)))
    np.testing.assert_array_equal(merged.edges(buckets), Quantiles.of(np.array(left + right)).edges(buckets))


def test_a_thinned_summary_keeps_its_promise() -> None:
    rng = np.random.default_rng(3)
    summary, parts = Quantiles.empty(), []
    for _ in range(20):
        parts.append(rng.lognormal(size=50_000))
        summary = summary.merge(Quantiles.of(parts[-1]))
    whole = np.sort(np.concatenate(parts))
    assert len(summary.values) <= 4 * Quantiles.CAPACITY
    assert summary.weights.sum() == len(whole)
    ranks = np.searchsorted(whole, summary.edges(20)) / len(whole)
    # A thinning moves a rank by at most 1 / CAPACITY; there were fewer than ten.
    np.testing.assert_allclose(ranks, np.arange(1, 20) / 20, atol=10 / Quantiles.CAPACITY)


def test_a_counter_folds_its_parts() -> None:
    counter = Counter(pl.Int64())
    for start in range(0, 3_000_000, 500_000):
        counter.add(pl.Series(np.arange(start, start + 750_000) % 2_000_000))
    frame = counter.frame()
    assert len(frame) == frame["value"].n_unique() == 2_000_000
    assert frame["count"].sum() == 6 * 750_000
    counter = Counter(pl.Int64())
    counter.add(pl.Series([1, 1]), np.array([2, 3]))
    assert counter.frame().rows() == [(1, 5)]
