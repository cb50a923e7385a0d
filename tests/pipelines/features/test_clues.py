"""Single columns: dates as numbers, several values in one text, long tails."""

from __future__ import annotations

import polars as pl
import pytest

from pipelines.features.clues import (
    empty_values,
    id_encoding,
    is_binary,
    is_epoch,
    mean,
    number_encoding,
    several_values,
    value_range,
)
from pipelines.features.spec import Hash, Quantile, Standard, Vocabulary


@pytest.mark.parametrize(
    ("values", "binary"),
    [
        ([0, 1], True),
        ([0.0, 1.0], True),
        ([True, False], True),
        ([0, 1, 2], False),
        ([1, 1], False),
        ([0, None], False),
    ],
)
def test_is_binary(values: list[object], binary: bool) -> None:
    assert is_binary(pl.Series(values)) is binary


@pytest.mark.parametrize(
    ("values", "epoch"),
    [([1_767_225_600], True), ([1_767_225_600_000], True), ([20260101], False), ([1.7e9], False), ([None], False)],
)
def test_is_epoch(values: list[object], epoch: bool) -> None:
    assert is_epoch(pl.Series(values)) is epoch


def test_empty_values_are_nulls_nan_and_empty_text() -> None:
    assert empty_values(pl.Series([None, "", "a"])) == 2
    assert empty_values(pl.Series([None, float("nan"), 1.0])) == 2


@pytest.mark.parametrize(
    ("values", "separator"),
    [
        (["a|b", "b|c", "a", "c"], "|"),
        (["x y", "y z", "z x", "x", "y", "x z", "z y"], " "),
        (["New York", "San Jose", "Los Angeles", "Rome"], None),
        (["red", "green"], None),
        (["1,5", "2,5", "3,5"], None),
    ],
)
def test_several_values_in_one_text(values: list[str], separator: str | None) -> None:
    found = several_values(pl.Series(values * 5))
    assert (found[0] if found else None) == separator


def test_lists_hold_several_values() -> None:
    found = several_values(pl.Series([["a"], ["a", "b"]]))
    assert found is not None
    assert (found[0], found[1].to_list()) == (None, [["a"], ["a", "b"]])


def test_number_encodings() -> None:
    assert number_encoding(pl.Series([0, 1, 2, 3, 10_000] * 10))[0] == Standard(log=True)
    assert number_encoding(pl.Series(range(100)))[0] == Quantile(buckets=20)
    assert number_encoding(pl.Series([-1.0, 0.5, 2.0, None]))[0] == Standard()


def test_id_encodings() -> None:
    assert id_encoding(7, 1000)[0] is None
    assert id_encoding(700, 1000)[0] == Vocabulary(min_count=2)
    assert id_encoding(70_000, 100_000)[0] == Hash(buckets=1_000_000)


def test_nothing_finite_is_no_crash() -> None:
    assert value_range(pl.Series([float("inf"), None])) == "none finite"
    assert mean(pl.Series([None], dtype=pl.Float64)) == 0.0
