"""A raw column of a chunk of rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl


@dataclass(frozen=True)
class Coded:
    """A column as its distinct values and, for each row, which of them it holds.

    Args:
        values: D distinct raw values.
        index: (N,) int32; -1 where the row has none.
    """

    values: pl.Series
    index: np.ndarray


RawColumn = pl.Series | Coded
