"""How values become numbers and ids: plain numpy on float64, the one arithmetic of batch and request.

Ids of every table: 0 is a missing value, 1 a value outside the vocabulary, values begin at 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import polars as pl

from pipelines.features.canonical import is_list
from pipelines.features.hashing import stable_hash
from pipelines.features.spec import Column, LogBucket, Standard
from pipelines.features.summaries import LIMIT, Moments

MISSING, UNKNOWN, FIRST = 0, 1, 2
_FLOAT32_MAX = float(np.finfo(np.float32).max)


def signed_log(x: np.ndarray) -> np.ndarray:
    """Return sign(x) log(1 + |x|) of (N,) float64."""
    return np.copysign(np.log1p(np.abs(x)), x)


def _clipped(x: np.ndarray, limit: float) -> np.ndarray:
    # What numpy's clip does, without the microseconds that it takes for a single number.
    return np.minimum(np.maximum(x, -limit), limit)


def prepared(x: np.ndarray, encoding: Standard) -> np.ndarray:
    """Return the numbers whose mean and deviation a ``standard`` column is measured by, (N,) float64."""
    return _clipped(signed_log(x) if encoding.log else x, LIMIT)


def standardise(x: np.ndarray, encoding: Standard, moments: Moments) -> np.ndarray:
    """Return :math:`(x - \\mu) / \\sigma`, clipped; a missing number (NaN) is 0.

    Args:
        x: (N,) float64, contiguous.
        encoding: whether to take logarithms first, and where to clip.
        moments: of the training data.

    Returns:
        (N,) float32, finite.

    Example:
        >>> standardise(np.array([0.0, 2.0, np.nan, np.inf]), Standard(), Moments.of(np.array([0.0, 2.0])))
        array([-1.,  1.,  0., 10.], dtype=float32)
    """
    y = (prepared(x, encoding) - moments.mean) / moments.deviation
    limit = _FLOAT32_MAX if encoding.clip is None else encoding.clip
    y = _clipped(y, limit)
    y[np.isnan(y)] = 0.0
    return y.astype(np.float32)


def log_ids(x: np.ndarray, encoding: LogBucket) -> np.ndarray:
    """Return the bucket ids of numbers (N,) float64: floor(log(1 + |x|) / log(base)), with x's sign.

    Example:
        >>> log_ids(np.array([0.0, 1.0, 3.0, -3.0, np.inf, np.nan]), LogBucket(base=2, buckets=5)).tolist()
        [7, 8, 9, 5, 12, 0]
    """
    with np.errstate(invalid="ignore"):
        level = np.floor(np.minimum(np.log1p(np.abs(x)) / math.log(encoding.base), encoding.buckets))
        ids = np.copysign(level, x) + (FIRST + encoding.buckets)
    ids[np.isnan(x)] = MISSING
    return ids.astype(np.int32)


def quantile_ids(x: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Return the bucket ids of numbers (N,) float64; a number equal to an edge is in the bucket above it.

    Example:
        >>> quantile_ids(np.array([0.0, 5.0, 9.0, -np.inf, np.nan]), np.array([5.0, 7.0])).tolist()
        [2, 3, 4, 2, 0]
    """
    ids = np.searchsorted(edges, x, side="right").astype(np.int32) + np.int32(FIRST)
    ids[np.isnan(x)] = MISSING
    return ids


def hash_ids(values: pl.Series, buckets: int, salt: int) -> np.ndarray:
    """Return 2 + hash mod buckets of canonical values without nulls, (N,) int32."""
    return (stable_hash(values, salt) % np.uint64(buckets)).astype(np.int32) + np.int32(FIRST)


def user_ids(values: pl.Series) -> np.ndarray:
    """Return the stable 64-bit number of each canonical user value, 0 where it is missing, (N,) int64."""
    known = values.is_not_null().to_numpy()
    out = np.zeros(len(values), dtype=np.int64)
    out[known] = stable_hash(values.drop_nulls()).view(np.int64)
    return out


class Lookup:
    """Ids of a vocabulary's values, for many batches: the index is built once.

    Args:
        values: distinct canonical values without nulls.
        ids: (K,) int32.

    Example:
        >>> lookup = Lookup(pl.Series(["a", "b"]), np.array([2, 3], dtype=np.int32))
        >>> lookup.ids(pl.Series(["b", None, "c"])).tolist()
        [3, 0, 1]
    """

    def __init__(self, values: pl.Series, ids: np.ndarray) -> None:
        text = values.dtype == pl.String
        self._find = _text_index(values, ids) if text else _number_index(values.to_numpy(), ids)

    def ids(self, values: pl.Series) -> np.ndarray:
        """Return the id of each canonical value, (N,) int32."""
        if values.null_count() == 0:
            return self._find(values)
        out = np.zeros(len(values), dtype=np.int32)
        out[values.is_not_null().to_numpy()] = self._find(values.drop_nulls())
        return out


_Find = Callable[[pl.Series], np.ndarray]


def _text_index(values: pl.Series, ids: np.ndarray) -> _Find:
    """An index of texts that outlives a batch: polars' own table of categories, where a join builds one a call."""
    if len(values) == 0:
        return lambda wanted: np.full(len(wanted), UNKNOWN, dtype=np.int32)
    dtype = pl.Categorical(pl.Categories.random())
    keys = values.cast(dtype)
    of_code = np.full(len(values), UNKNOWN, dtype=np.int32)
    of_code[keys.to_physical().to_numpy()] = ids

    # The default keeps the keys, and with them polars' table, alive. Unseen texts get codes beyond the keys'.
    def find(wanted: pl.Series, keys: pl.Series = keys) -> np.ndarray:
        codes = wanted.cast(keys.dtype).to_physical().to_numpy()
        out = of_code[np.minimum(codes, len(of_code) - 1)]
        out[codes >= len(of_code)] = UNKNOWN
        return out

    return find


def _number_index(values: np.ndarray, ids: np.ndarray) -> _Find:
    """An index of numbers: an array addressed by the number where they lie close, a search otherwise."""
    if len(values) == 0:
        return lambda wanted: np.full(len(wanted), UNKNOWN, dtype=np.int32)
    order = np.argsort(values, kind="stable")
    keys, of_place = values[order], ids[order]
    low, high = keys[0], keys[-1]
    if keys.dtype == np.int64 and int(high) - int(low) < 4 * len(keys) + 65_536:
        direct = np.full(int(high - low) + 1, UNKNOWN, dtype=np.int32)
        direct[keys - low] = of_place

        def address(wanted: pl.Series) -> np.ndarray:
            x = wanted.to_numpy()
            inside = (x >= low) & (x <= high)
            return np.where(inside, direct[np.where(inside, x, low) - low], np.int32(UNKNOWN))

        return address

    def search(wanted: pl.Series) -> np.ndarray:
        x = wanted.to_numpy()
        at = np.minimum(np.searchsorted(keys, x), len(keys) - 1)
        return np.where(keys[at] == x, of_place[at], np.int32(UNKNOWN))

    return search


def flat_lists(values: pl.Series, column: Column) -> tuple[pl.Series, np.ndarray]:
    """Return the elements of a multi or sequence column and each row's number of them.

    Missing elements are dropped first; then a multi keeps its first ``max_length``, a sequence its last.
    Text is split at the column's separator.

    Returns:
        Raw elements (total,) and lengths (N,) int64.

    Raises:
        ValueError: the column holds neither lists nor text to be split.
    """
    if values.dtype == pl.Null:
        values = values.cast(pl.List(pl.String))
    if not is_list(values.dtype):
        if column.separator is None:
            raise ValueError("expected a list")
        values = values.cast(pl.String).str.split(column.separator)
    if values.dtype == pl.Array:
        values = values.arr.to_list()
    lengths = values.list.len().fill_null(0).cast(pl.Int64).to_numpy()
    elements = values.drop_nulls().explode(empty_as_null=False, keep_nulls=False)
    known = _known(elements)
    if not known.all():
        rows = np.repeat(np.arange(len(values)), lengths)
        lengths = np.bincount(rows[known], minlength=len(values))
        elements = elements.filter(pl.Series(known))
    over = lengths > column.max_length
    if over.any():
        starts = np.cumsum(lengths) - lengths
        kept = np.minimum(lengths, column.max_length)
        place = np.arange(len(elements)) - np.repeat(starts, lengths)
        if column.kind == "sequence":
            chosen = place >= np.repeat(lengths - kept, lengths)
        else:
            chosen = place < column.max_length
        elements, lengths = elements.filter(pl.Series(chosen)), kept
    return elements, lengths


def _known(elements: pl.Series) -> np.ndarray:
    known = elements.is_not_null()
    if elements.dtype.is_float():
        known = known & elements.is_not_nan().fill_null(False)
    elif elements.dtype == pl.String:
        known = known & (elements != "").fill_null(False)
    return known.to_numpy()
