"""What the values of one column tell of its kind and its encoding."""

from __future__ import annotations

import numpy as np
import polars as pl

from pipelines.features.spec import Encoding, Hash, Quantile, Standard, Vocabulary

SAMPLE = 100_000
"""Rows that are looked at unless the user says otherwise."""
_SEPARATORS = ("|", ";", ",", " ")


def is_binary(series: pl.Series) -> bool:
    """Return whether it holds both 0 and 1 and nothing else.

    Example:
        >>> is_binary(pl.Series([0, 1, 1])), is_binary(pl.Series([0, 1, None])), is_binary(pl.Series([0, 0]))
        (True, False, False)
    """
    if series.dtype == pl.Boolean:
        return series.null_count() == 0 and series.n_unique() == 2
    return series.dtype.is_numeric() and series.null_count() == 0 and set(series.unique().head(3)) == {0, 1}


def is_epoch(series: pl.Series) -> bool:
    """Return whether its integers may be seconds to nanoseconds since 1970, in 1990 or later."""
    if not series.dtype.is_integer() or series.null_count() == len(series):
        return False
    return 6e8 < float(series.drop_nulls().to_numpy().min()) < 5e18


def empty_values(series: pl.Series) -> int:
    """Count nulls, NaN and empty text."""
    empty = series.null_count()
    if series.dtype.is_float():
        empty += int(series.is_nan().sum())
    if series.dtype == pl.String:
        empty += int((series == "").sum())
    return empty


def several_values(series: pl.Series) -> tuple[str | None, pl.Series] | None:
    """Return what separates the values of a column that holds several a row, and the values; None for a plain one.

    Example:
        >>> several_values(pl.Series(["war|drama", "drama", "comedy|war", "war"] * 9))[0]
        '|'
    """
    if isinstance(series.dtype, pl.List | pl.Array):
        return None, series.cast(pl.List(series.dtype.inner))
    if series.dtype != pl.String:
        return None
    text = series.drop_nulls().head(20_000)
    for separator in _SEPARATORS:
        if mean(text.str.contains(separator, literal=True)) < 0.2:
            continue
        elements = text.str.split(separator)
        inner = elements.explode().str.strip_chars()
        # A set's members come back in other rows and combinations; the words of a name or an address hardly do.
        limit = text.n_unique() if separator in "|;" else 0.5 * text.n_unique()
        if inner.n_unique() <= limit and inner.str.len_chars().to_numpy().max() <= 40:
            return separator, series.str.split(separator)
    return None


def number_encoding(series: pl.Series) -> tuple[Encoding, str]:
    """Return how to encode numbers, and why."""
    values = _numbers(series)
    if len(values) and values.min() >= 0 and np.quantile(values, 0.99) > 10 * max(np.median(values), 1e-9):
        return Standard(log=True), "long-tailed, so the logarithm, standardised"
    if series.dtype.is_integer():
        return Quantile(buckets=20), "numbers by type and name, cut at 20 quantiles"
    return Standard(), "standardised"


def id_encoding(distinct: int, rows: int) -> tuple[Encoding | None, str]:
    """Return how to encode so many distinct values (None: as the kind's default), and why."""
    if distinct > 0.5 * rows and rows >= SAMPLE:
        return Hash(buckets=1_000_000), ": more than half are new, so they are hashed rather than kept"
    if distinct > 100:
        return Vocabulary(min_count=2), "; values seen once in training share id 1"
    return None, ""


def value_range(series: pl.Series) -> str:
    """Return the least and the largest finite number in words."""
    values = _numbers(series)
    return f"{values.min():,.6g} to {values.max():,.6g}" if len(values) else "none finite"


def _numbers(series: pl.Series) -> np.ndarray:
    values = series.cast(pl.Float64).drop_nulls().to_numpy()
    return values[np.isfinite(values)]


def mean(series: pl.Series) -> float:
    """Return the mean of the values that are there, 0 if none is."""
    return float(series.drop_nulls().to_numpy().mean()) if series.null_count() < len(series) else 0.0
