"""What is remembered of a column: counts, moments, quantiles. Each can be merged with its like."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl

LIMIT = 1e150
"""Numbers are held within this magnitude, so that infinities and their like leave mean and deviation finite."""


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations, merged by Chan's update (Chan, Golub & LeVeque, 1979).

    Example:
        >>> whole = Moments.of(np.array([1.0, 2.0, 3.0, 6.0]))
        >>> parts = Moments.of(np.array([1.0, 2.0])).merge(Moments.of(np.array([3.0, 6.0])))
        >>> whole.mean == parts.mean, round(whole.deviation, 6) == round(parts.deviation, 6)
        (True, True)
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    @classmethod
    def of(cls, x: np.ndarray, weights: np.ndarray | None = None) -> Moments:
        """Summarise numbers (N,); NaN is left out, infinities count as the largest number."""
        known = ~np.isnan(x)
        if not known.all():
            x, weights = x[known], None if weights is None else weights[known]
        if len(x) == 0:
            return cls()
        x = np.clip(x, -LIMIT, LIMIT)
        if weights is None:
            mean = float(x.mean())
            return cls(len(x), mean, float(np.square(x - mean).sum()))
        total = int(weights.sum())
        if total == 0:
            return cls()
        mean = float((x * (weights / total)).sum())
        return cls(total, mean, float((np.square(x - mean) * weights).sum()))

    def merge(self, other: Moments) -> Moments:
        """Return the summary of both columns, one after the other."""
        if self.count == 0 or other.count == 0:
            return self if other.count == 0 else other
        count = self.count + other.count
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        between = delta * delta * (self.count / count * other.count)
        return Moments(count, mean, self.squares + other.squares + between)

    @property
    def deviation(self) -> float:
        """Standard deviation; 1 for a constant column, whose rounding noise must not be blown up."""
        if self.count == 0:
            return 1.0
        deviation = float(np.sqrt(self.squares / self.count))
        return deviation if deviation > 1e-12 * max(abs(self.mean), 1e-300) else 1.0


@dataclass(frozen=True)
class Quantiles:
    """A weighted sample of a column's distinct numbers: exact up to ``CAPACITY`` of them, then thinned.

    Thinning keeps ``CAPACITY`` values at equal steps of rank, so a quantile is off by at most the share
    1 / CAPACITY for each thinning.

    Args:
        values: (K,) float64, rising.
        weights: (K,) int64, how many numbers each stands for.
    """

    values: np.ndarray
    weights: np.ndarray

    CAPACITY = 65_536

    @classmethod
    def empty(cls) -> Quantiles:
        """Return the summary of nothing."""
        return cls(np.empty(0), np.empty(0, dtype=np.int64))

    @classmethod
    def of(cls, x: np.ndarray, weights: np.ndarray | None = None) -> Quantiles:
        """Summarise numbers (N,); NaN and infinities are left out."""
        known = np.isfinite(x)
        x = x[known]
        values, index, counts = np.unique(x, return_inverse=True, return_counts=True)
        if weights is not None:
            counts = np.bincount(index, weights=weights[known], minlength=len(values))
        return cls(values, counts.astype(np.int64))._thinned(4)

    def merge(self, other: Quantiles) -> Quantiles:
        """Return the summary of both columns."""
        values, index = np.unique(np.concatenate([self.values, other.values]), return_inverse=True)
        weights = np.bincount(index, weights=np.concatenate([self.weights, other.weights]), minlength=len(values))
        return Quantiles(values, weights.astype(np.int64))._thinned(4)

    def _thinned(self, slack: int = 1) -> Quantiles:
        if len(self.values) <= slack * self.CAPACITY:
            return self
        ends = np.cumsum(self.weights)
        total = int(ends[-1])
        bounds = np.array([k * total // self.CAPACITY for k in range(self.CAPACITY + 1)], dtype=np.int64)
        picked = np.searchsorted(ends, (bounds[:-1] + bounds[1:]) // 2, side="right")
        keep, first = np.unique(picked, return_index=True)
        weights = np.add.reduceat(np.diff(bounds), first)
        return Quantiles(self.values[keep], weights)

    def edges(self, buckets: int) -> np.ndarray:
        """Return the rising numbers that cut the column into at most ``buckets`` parts of equal weight.

        A number equal to an edge belongs to the part above it. Ties make fewer parts.

        Example:
            >>> Quantiles.of(np.arange(1.0, 101.0)).edges(4)
            array([26., 51., 76.])
        """
        if len(self.values) == 0:
            return np.empty(0)
        below = np.cumsum(self.weights) - self.weights
        total = int(below[-1] + self.weights[-1])
        wanted = np.array([-(-k * total // buckets) for k in range(1, buckets)], dtype=np.int64)
        at = np.searchsorted(below, wanted, side="left")
        return self.values[np.unique(at[at < len(self.values)])]


class Counter:
    """Counts the values of a column; its memory is that of the distinct values.

    Example:
        >>> counter = Counter(pl.String())
        >>> counter.add(pl.Series(["a", "b", "a"]))
        >>> counter.frame().sort("value").rows()
        [('a', 2), ('b', 1)]
    """

    def __init__(self, dtype: pl.DataType) -> None:
        self._parts = [pl.DataFrame(schema={"value": dtype, "count": pl.Int64})]

    def add(self, values: pl.Series, counts: np.ndarray | None = None, *, distinct: bool = False) -> None:
        """Count values (N,) without nulls, each once or ``counts`` times; they may be known to be distinct."""
        if len(values) == 0:
            return
        times = np.ones(len(values), dtype=np.int64) if counts is None else counts.astype(np.int64)
        part = pl.DataFrame({"value": values, "count": times})
        self._parts.append(part if distinct else _summed(part))
        if sum(map(len, self._parts[1:])) > max(len(self._parts[0]), 1 << 20):
            self._parts = [self.frame()]

    def frame(self) -> pl.DataFrame:
        """Return columns value and count, in no order."""
        return _summed(pl.concat(self._parts)) if len(self._parts) > 2 else self._parts[-1]


def _summed(frame: pl.DataFrame) -> pl.DataFrame:
    return frame.group_by("value").agg(pl.col("count").sum())
