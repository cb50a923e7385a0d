"""One form for each raw value, so that a log and a request that mean the same are encoded the same."""

from __future__ import annotations

import math
import re
from decimal import Decimal
from typing import Any, Literal

import numpy as np
import polars as pl
from polars._typing import PolarsDataType

Type = Literal["integer", "float", "text"]
"""What the values of a raw column (or of its lists) are. Booleans are integers, 0 and 1."""

DTYPES: dict[str, type[pl.DataType]] = {"integer": pl.Int64, "float": pl.Float64, "text": pl.String}
MAX_TEXT = 65_536
"""Characters of the longest text value that is taken as a value and not as an accident."""

_INTEGER = re.compile(r"[+-]?[0-9]{1,19}")
_FLOAT = re.compile(r"[+-]?(?:(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?|inf|nan)", re.IGNORECASE)


def is_list(dtype: PolarsDataType) -> bool:
    """Say whether a column holds lists."""
    return dtype in (pl.List, pl.Array)


def type_of(dtype: PolarsDataType) -> Type | None:
    """Return the canonical type of a column; of its elements for a list; None if it can't be a feature.

    Example:
        >>> type_of(pl.UInt8()), type_of(pl.List(pl.String)), type_of(pl.Date())
        ('integer', 'text', None)
    """
    if isinstance(dtype, type):
        dtype = dtype()
    if isinstance(dtype, pl.List | pl.Array):
        return None if is_list(dtype.inner) else type_of(dtype.inner)
    if dtype.is_integer() or dtype == pl.Boolean:
        return "integer"
    if dtype.is_float() or dtype.is_decimal():
        return "float"
    if isinstance(dtype, pl.String | pl.Categorical | pl.Enum | pl.Null):
        return "text"
    return None


def canonical(value: Any, kind: Type) -> int | float | str | None:
    """Return the one form of a value; None, NaN and the empty text are missing and give None.

    An integer column takes 5, 5.0, true and "5"; a float column any number or its text; a text column text,
    and integers as their decimal digits.

    Raises:
        ValueError: the value is no such thing.

    Example:
        >>> canonical("5", "integer"), canonical(5, "text"), canonical(float("nan"), "float")
        (5, '5', None)
    """
    if value is None:
        return None
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Decimal):
        value = float(value)
    if isinstance(value, str):
        if value == "":
            return None
        if len(value) > MAX_TEXT:
            raise ValueError(f"text of {len(value):,} characters; at most {MAX_TEXT:,} are taken")
    if kind == "text":
        return _text(value)
    return _integer(value) if kind == "integer" else _float(value)


def _text(value: Any) -> str:
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError("text that is not valid Unicode") from None
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise ValueError(f"expected text, found {_shown(value)}")


def _integer(value: Any) -> int | None:
    if isinstance(value, float):
        if math.isnan(value):
            return None
        number = int(value) if value.is_integer() else None
    elif isinstance(value, int) or (isinstance(value, str) and _INTEGER.fullmatch(value)):
        number = int(value)
    else:
        number = None
    if number is None:
        raise ValueError(f"expected an integer, found {_shown(value)}")
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"{_shown(value)} does not fit 64 bits")
    return number


def _float(value: Any) -> float | None:
    if isinstance(value, str) and not _FLOAT.fullmatch(value):
        raise ValueError(f"expected a number, found {_shown(value)}")
    if not isinstance(value, int | float | str):
        raise ValueError(f"expected a number, found {_shown(value)}")
    try:
        number = float(value)
    except OverflowError:
        raise ValueError(f"{_shown(value)} is too large a number") from None
    # Adding 0.0 makes one zero of the two.
    return None if math.isnan(number) else number + 0.0


def _shown(value: Any) -> str:
    if isinstance(value, dict | list | tuple):
        return {"dict": "an object", "list": "a list", "tuple": "a list"}[type(value).__name__]
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**30 else "a huge integer"
    return text if len(text) <= 40 else text[:37] + "..."


def canonical_series(series: pl.Series, kind: Type) -> pl.Series:
    """Return a column in canonical form: Int64, Float64 or String, null where missing.

    Columns that already are of the kind are cast as a whole; others go through :func:`canonical`, each
    distinct value once.

    Raises:
        ValueError: some value is not of the kind.
    """
    dtype = series.dtype
    have = type_of(dtype)
    if dtype == pl.Null:
        return pl.Series(series.name, [None] * len(series), dtype=DTYPES[kind])
    if have == "text" and kind == "text":
        text = series.cast(pl.String)
        return text.set(text == "", None) if (text == "").any() else text
    if have == "integer" and kind == "integer":
        whole = series.cast(pl.Int64, strict=False)
        if whole.null_count() > series.null_count():
            value = series.filter(whole.is_null() & series.is_not_null())[0]
            raise ValueError(f"{_shown(value)} does not fit 64 bits")
        return whole
    if kind == "float" and have in ("integer", "float"):
        return pl.Series(series.name, numbers(series)).fill_nan(None)
    if have == "integer" and kind == "text" and dtype != pl.Boolean:
        return series.cast(pl.String)
    distinct = series.unique()
    forms = pl.Series([canonical(v, kind) for v in distinct.to_list()], dtype=DTYPES[kind])
    if len(distinct) == 0:
        return pl.Series(series.name, [], dtype=DTYPES[kind])
    pair = pl.DataFrame({"raw": distinct, "form": forms})
    raw = series.rename("raw").to_frame()
    joined = raw.join(pair, on="raw", how="left", nulls_equal=True, maintain_order="left")
    return joined["form"].rename(series.name)


def numbers(series: pl.Series) -> np.ndarray:
    """Return a column of numbers as (N,) float64, contiguous, NaN where missing.

    Raises:
        ValueError: some value is no number.
    """
    if not (series.dtype.is_numeric() or series.dtype == pl.Boolean):
        series = canonical_series(series, "float")
    # numpy adds the 0.0 that makes one zero of the two; polars would leave it out.
    return series.cast(pl.Float64).fill_null(np.nan).to_numpy() + 0.0
