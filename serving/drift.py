"""What live traffic looks like beside training: missing and unknown values, scores, and how far they have moved."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from ctr_models.batch import EncodedRows
from pipelines.features.encoders import MISSING, UNKNOWN
from pipelines.release.reference import columns
from serving.batching import Encoded
from serving.families import buckets
from serving.scorer import Scorer

ROWS_A_SECOND = 5000
"""Candidates of a slot that are looked at, at most: all of little traffic, some of much."""
FLUSH_ROWS = 1024
WINDOW_SECONDS = 600.0
"""PSI is that of the window that runs and of the one before it."""
LEAST = 500
"""Values, fewer of which say nothing of a spread."""
SCORES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


class Watch:
    """Counts of one bundle's traffic.

    What all candidates of a request share counts once a request.

    Args:
        scorer: of the bundle.
    """

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer
        self._reference = scorer.bundle.reference
        names = [f.name for f in scorer.bundle.state.schema().fields]
        self.values = dict.fromkeys(names, 0)
        self.missing = dict.fromkeys(names, 0)
        self.unknown = dict.fromkeys(names, 0)
        self.scores, self.sum = np.zeros(len(SCORES) + 1, dtype=np.int64), 0.0
        self._kept: list[tuple[Encoded, np.ndarray]] = []
        self._rows = 0
        self._next = 0.0
        self._windows: list[dict[str, np.ndarray]] = [{}, {}]
        self._turn = time.monotonic() + WINDOW_SECONDS

    def saw(self, encoded: Encoded, scores: np.ndarray) -> None:
        """Look at a scored request, unless there are too many."""
        now = time.perf_counter()
        if now < self._next:
            return
        self._next = now + len(scores) / ROWS_A_SECOND
        self._kept.append((encoded, scores))
        self._rows += len(scores)
        if self._rows >= FLUSH_ROWS:
            self.flush()

    def flush(self) -> None:
        """Count what was kept."""
        if time.monotonic() >= self._turn:
            self._windows = [{}, self._windows[0]]
            self._turn = time.monotonic() + WINDOW_SECONDS
        kept, self._kept, self._rows = self._kept, [], 0
        if not kept:
            return
        alike: dict[int, list[EncodedRows]] = {}
        for encoded, _ in kept:
            for part in (encoded.shared, encoded.own):
                if part is not None:
                    alike.setdefault(id(part.schema), []).append(part)
        for parts in alike.values():
            self._count(EncodedRows.concat(parts))
        scores = np.concatenate([scores for _, scores in kept])
        self.scores += np.bincount(np.searchsorted(SCORES, scores), minlength=len(SCORES) + 1)
        self.sum += float(scores.sum())
        if self._reference is not None:
            self._add("", self._reference.scores.counts(scores))

    def psi(self) -> tuple[float | None, dict[str, float]]:
        """Return how far scores, and each field, are from the reference; none where too few were seen."""
        if self._reference is None:
            return None, {}
        known = {"": self._reference.scores, **self._reference.fields}
        found = {}
        for name, spread in known.items():
            counts = sum(window[name] for window in self._windows if name in window)
            if isinstance(counts, np.ndarray) and counts.sum() >= LEAST:
                found[name] = spread.psi(counts)
        return found.pop("", None), found

    def _count(self, rows: EncodedRows) -> None:
        for name, values in columns(rows).items():
            self.values[name] += len(values)
            # A missing number is encoded as the mean, 0, and so is one that is the mean.
            self.missing[name] += int(np.count_nonzero(values == MISSING))
            if values.dtype.kind == "i":
                self.unknown[name] += int(np.count_nonzero(values == UNKNOWN))
            if self._reference is not None and name in self._reference.fields:
                self._add(name, self._reference.fields[name].counts(values))

    def _add(self, name: str, counts: np.ndarray) -> None:
        window = self._windows[0]
        window[name] = window[name] + counts if name in window else counts


class Drift(Collector):
    """The traffic of each slot, as Prometheus families.

    Args:
        registry: that it joins.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._slots: dict[str, Watch] = {}
        registry.register(self)

    def saw(self, slot: str, scorer: Scorer, encoded: Encoded, scores: np.ndarray) -> None:
        """Look at a request that a slot's bundle scored; with another bundle the counts begin anew."""
        watch = self._slots.get(slot)
        if watch is None or watch.scorer is not scorer:
            watch = self._slots[slot] = Watch(scorer)
        watch.saw(encoded, scores)

    def describe(self) -> Iterator[Metric]:
        """Return the families without values."""
        yield from self._families()

    def collect(self) -> Iterator[Metric]:
        """Return the families."""
        values, missing, unknown, scores, score_psi, field_psi = self._families()
        for slot, watch in self._slots.items():
            watch.flush()
            model = watch.scorer.card.hash[:12]
            for name, count in watch.values.items():
                values.add_metric((slot, model, name), count)
                missing.add_metric((slot, model, name), watch.missing[name])
                unknown.add_metric((slot, model, name), watch.unknown[name])
            scores.add_metric((slot, model), buckets(SCORES, watch.scores.tolist()), watch.sum)
            of_scores, of_fields = watch.psi()
            if of_scores is not None:
                score_psi.add_metric((slot, model), of_scores)
            for name, psi in of_fields.items():
                field_psi.add_metric((slot, model, name), psi)
        yield from (values, missing, unknown, scores, score_psi, field_psi)

    @staticmethod
    def _families() -> tuple[
        CounterMetricFamily,
        CounterMetricFamily,
        CounterMetricFamily,
        HistogramMetricFamily,
        GaugeMetricFamily,
        GaugeMetricFamily,
    ]:
        field, slot = ("slot", "model", "field"), ("slot", "model")
        return (
            CounterMetricFamily("sluice_feature_values", "Values of a field that were looked at.", labels=field),
            CounterMetricFamily("sluice_feature_missing", "Those that were missing.", labels=field),
            CounterMetricFamily("sluice_feature_unknown", "Those out of the vocabulary.", labels=field),
            HistogramMetricFamily("sluice_score", "Scores that were looked at.", labels=slot),
            GaugeMetricFamily("sluice_score_psi", "How far the scores are from training.", labels=slot),
            GaugeMetricFamily("sluice_feature_psi", "How far a field is from training.", labels=field),
        )
