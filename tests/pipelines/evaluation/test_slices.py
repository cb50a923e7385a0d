from __future__ import annotations

import numpy as np
import pytest

from ctr_models.errors import DataError
from pipelines.evaluation.metrics import evaluate
from pipelines.evaluation.slices import slice_metrics


def rows(n=3000):
    rng = np.random.default_rng(0)
    p = rng.random(n)
    return rng.choice(["a", "b", "c"], n, p=[0.6, 0.3, 0.1]), rng.random(n) < p, p, rng.integers(0, 50, n)


def test_each_slice_is_evaluated_on_its_own_rows():
    values, y, p, user = rows()
    found = slice_metrics(values, y, p, user)
    assert [s.value for s in found] == ["a", "b", "c"]
    for s in found:
        own = values == s.value
        assert (s.rows, s.clicks) == (own.sum(), y[own].sum())
        assert s.metrics == evaluate(y[own], p[own], user[own])


def test_small_slices_are_left_out_and_many_are_cut():
    values, y, p, _ = rows()
    assert [s.value for s in slice_metrics(values, y, p, minimum=500)] == ["a", "b"]
    assert [s.value for s in slice_metrics(values, y, p, limit=1)] == ["a"]


def test_missing_values_are_one_slice():
    found = slice_metrics([None, float("nan"), None, 3], [0, 1, 0, 1], [0.1, 0.9, 0.2, 0.5], minimum=2)
    assert [(s.value, s.rows) for s in found] == [(None, 3)]


def test_a_slice_of_one_class_has_no_auc():
    (only,) = slice_metrics([1, 1], [1, 1], [0.5, 0.5], minimum=1)
    assert set(only.metrics) == {"logloss", "ece"}


def test_bad_rows_are_named_by_their_number_in_the_whole():
    with pytest.raises(DataError, match="label, row 3: label is 2"):
        slice_metrics(["a", "b", "a", "b"], [0, 1, 0, 2], [0.1] * 4)
    with pytest.raises(DataError, match="one value a row"):
        slice_metrics(["a"], [0, 1], [0.1, 0.2])
