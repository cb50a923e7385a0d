"""Prometheus families for the hot path: to count or to observe costs a tenth of a microsecond.

They show what those of ``prometheus_client`` show, without locks: one thread counts and collects, that of the event
loop.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

Labels = tuple[str, ...]


class Counter(Collector):
    """A count by labels.

    Args:
        name: of the metric, without ``_total``.
        documentation: what it says.
        labels: their names.
        registry: that it joins.

    Example:
        >>> registry = CollectorRegistry()
        >>> requests = Counter("requests", "Answered.", ["route"], registry=registry)
        >>> requests.inc(("/v1/score",))
        >>> registry.get_sample_value("requests_total", {"route": "/v1/score"})
        1.0
    """

    def __init__(
        self, name: str, documentation: str, labels: Sequence[str] = (), *, registry: CollectorRegistry
    ) -> None:
        self._name, self._documentation, self._labelnames = name, documentation, tuple(labels)
        self._counts: dict[Labels, float] = {} if labels else {(): 0.0}
        registry.register(self)

    def inc(self, labels: Labels, amount: float = 1) -> None:
        """Count."""
        self._counts[labels] = self._counts.get(labels, 0.0) + amount

    def describe(self) -> Iterator[CounterMetricFamily]:
        """Return the family without values."""
        yield CounterMetricFamily(self._name, self._documentation, labels=self._labelnames)

    def collect(self) -> Iterator[CounterMetricFamily]:
        """Return the family."""
        (family,) = self.describe()
        for labels, count in self._counts.items():
            family.add_metric(labels, count)
        yield family


class _Cell:
    __slots__ = ("counts", "sum")

    def __init__(self, size: int) -> None:
        self.counts, self.sum = [0] * size, 0.0


class Histogram(Collector):
    """Values in buckets, by labels.

    Args:
        name: of the metric.
        documentation: what it says.
        labels: their names.
        buckets: upper bounds, rising, without infinity.
        registry: that it joins.

    Example:
        >>> registry = CollectorRegistry()
        >>> seconds = Histogram("seconds", "Of a stage.", ["stage"], buckets=(0.1, 1), registry=registry)
        >>> seconds.observe(("read",), 0.5)
        >>> registry.get_sample_value("seconds_bucket", {"stage": "read", "le": "1.0"})
        1.0
    """

    def __init__(
        self,
        name: str,
        documentation: str,
        labels: Sequence[str] = (),
        *,
        buckets: Sequence[float],
        registry: CollectorRegistry,
    ) -> None:
        self._name, self._documentation, self._labelnames = name, documentation, tuple(labels)
        self._bounds = tuple(float(bound) for bound in buckets)
        self._cells: dict[Labels, _Cell] = {} if labels else {(): _Cell(len(self._bounds) + 1)}
        registry.register(self)

    def observe(self, labels: Labels, value: float) -> None:
        """Count a value under labels."""
        cell = self._cells.get(labels)
        if cell is None:
            cell = self._cells[labels] = _Cell(len(self._bounds) + 1)
        cell.counts[bisect_left(self._bounds, value)] += 1
        cell.sum += value

    def describe(self) -> Iterator[HistogramMetricFamily]:
        """Return the family without values."""
        yield HistogramMetricFamily(self._name, self._documentation, labels=self._labelnames)

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """Return the family."""
        (family,) = self.describe()
        for labels, cell in self._cells.items():
            family.add_metric(labels, buckets(self._bounds, cell.counts), cell.sum)
        yield family


def buckets(bounds: Sequence[float], counts: Sequence[int]) -> list[tuple[str, float]]:
    """Return counts by bucket as a family wants them: cumulative, each with its upper bound as text.

    Args:
        bounds: upper ones, rising, without infinity.
        counts: one more than bounds.

    Example:
        >>> buckets([0.5, 1], [3, 2, 1])
        [('0.5', 3.0), ('1.0', 5.0), ('+Inf', 6.0)]
    """
    names = [*(floatToGoString(bound) for bound in bounds), "+Inf"]
    return [(name, float(count)) for name, count in zip(names, accumulate(counts), strict=True)]
