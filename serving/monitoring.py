"""What can be seen from outside: the Prometheus metrics of an application."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Gauge, ProcessCollector, generate_latest
from prometheus_client import Counter as RareCounter
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from serving.families import Counter, Histogram
from serving.schemas import ModelCard, StoredFeatures
from serving.stages import Stages

if TYPE_CHECKING:
    from serving.events import EventStore
    from serving.router import Assignment

_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_ROWS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)


class Metrics:
    """The metrics of one application, in a registry of its own.

    What counts each request is of :mod:`serving.families`, what counts rare things of ``prometheus_client``.
    """

    def __init__(self) -> None:
        from serving.drift import Drift

        self.registry = CollectorRegistry()
        own = self.registry
        self.requests = Counter("sluice_requests", "Requests answered.", ["route", "status"], registry=own)
        self.seconds = Histogram(
            "sluice_request_seconds",
            "From the first byte of a request to the last of its answer.",
            ["route"],
            buckets=_SECONDS,
            registry=own,
        )
        self.stages = Histogram(
            "sluice_stage_seconds", "Stages of scored requests.", ["stage"], buckets=_SECONDS, registry=own
        )
        self.arms = Histogram(
            "sluice_arm_seconds",
            "From a parsed request of an arm to its scores, exposure included.",
            ["experiment", "arm"],
            buckets=_SECONDS,
            registry=own,
        )
        self.exposures = Counter(
            "sluice_arm_exposures", "Requests answered by an arm.", ["experiment", "arm"], registry=own
        )
        self.outcomes = Counter(
            "sluice_arm_events",
            "Events that name a request of an arm, a candidate's of each type once.",
            ["experiment", "arm", "type"],
            registry=own,
        )
        self.candidates = Counter("sluice_candidates", "Candidates scored.", registry=own)
        self.errors = RareCounter(
            "sluice_errors_total", "Requests refused or failed, by reason.", ["reason"], registry=own
        )
        self._overloaded = self.errors.labels("overloaded")
        self.model = Gauge(
            "sluice_model_info", "The models that answer.", ["slot", "name", "version", "hash"], registry=own
        )
        self.loads = RareCounter(
            "sluice_model_loads_total",
            "Bundles that came to answer (swapped) or were refused.",
            ["slot", "result"],
            registry=own,
        )
        self.pass_rows = Histogram("sluice_pass_rows", "Candidates of a forward pass.", buckets=_ROWS, registry=own)
        self.pass_requests = Histogram(
            "sluice_pass_requests", "Requests that share a forward pass.", buckets=_ROWS, registry=own
        )
        self.pass_failures = RareCounter(
            "sluice_pass_failures_total", "Shared passes that failed; their requests went each alone.", registry=own
        )
        self.waiting = Gauge("sluice_queue_rows", "Candidates that wait for a pass.", registry=own)
        self.in_hand = Gauge("sluice_requests_in_hand", "Requests that are being answered.", registry=own)
        self.features_up = Gauge("sluice_features_up", "Whether the online feature store answers.", registry=own)
        self.features_missing = Counter(
            "sluice_features_missing", "Users and items that were asked for and are not stored.", ["of"],
            registry=own,
        )  # fmt: skip
        self.drift = Drift(own)
        ProcessCollector(registry=own)
        self._cards: dict[str, tuple[str, ...]] = {}

    def serves(self, slot: str, card: ModelCard) -> None:
        """Record which model answers in a slot from now on."""
        if slot in self._cards:
            self.model.remove(*self._cards[slot])
        version = "" if card.version is None else str(card.version)
        self._cards[slot] = (slot, card.name, version, card.hash)
        self.model.labels(*self._cards[slot]).set(1)
        self.loads.labels(slot, "swapped").inc()

    def refuses(self, slot: str) -> None:
        """Record that a bundle was refused."""
        self.loads.labels(slot, "refused").inc()

    def passed(self, requests: int, rows: int) -> None:
        """Record a forward pass."""
        self.pass_requests.observe((), requests)
        self.pass_rows.observe((), rows)

    def looked_up(self, stored: StoredFeatures) -> None:
        """Record what the online feature store did not give for a request."""
        self.features_missing.inc(("user",), stored.missing.user)
        self.features_missing.inc(("item",), len(stored.missing.items))

    def turned_away(self) -> None:
        """Record a request that was refused at the door; nobody looked which route it asked for."""
        self.requests.inc(("other", "503"))
        self._overloaded.inc()

    def answered(self, route: str, status: int, seconds: float, stages: Stages) -> None:
        """Record a request.

        Args:
            route: its path, with placeholders.
            status: of the answer.
            seconds: that it took.
            stages: of a scored one.
        """
        self.requests.inc((route, str(status)))
        self.seconds.observe((route,), seconds)
        for stage, begin, end in stages.found:
            self.stages.observe((stage,), end - begin)

    def served(self, assignments: Sequence[Assignment], seconds: float) -> None:
        """Record a scored request in the arms that it is counted in, and how long its scoring took."""
        for one in assignments:
            arm = one.experiment, one.arm.name
            self.arms.observe(arm, seconds)
            self.exposures.inc(arm)

    def watch_store(self, store: EventStore) -> None:
        """Show how an event store is, whenever somebody looks."""
        _StoreCollector(self.registry, store)

    def exposition(self) -> bytes:
        """Return Prometheus' text format."""
        return generate_latest(self.registry)


class _StoreCollector(Collector):
    """An event store, as Prometheus families."""

    def __init__(self, registry: CollectorRegistry, store: EventStore) -> None:
        self._store = store
        registry.register(self)

    def describe(self) -> Iterator[Metric]:
        """Return the families; asking a store costs nothing."""
        return self.collect()

    def collect(self) -> Iterator[Metric]:
        """Return the families."""
        status = self._store.status
        yield GaugeMetricFamily(
            "sluice_events_up", "Whether the database takes rows.", value=status.state == "ready"
        )
        yield GaugeMetricFamily("sluice_events_waiting_rows", "Rows in memory.", value=status.waiting)
        yield GaugeMetricFamily("sluice_spool_bytes", "On disk, for the database.", value=status.spooled_bytes)
        yield GaugeMetricFamily(
            "sluice_spool_lag_seconds", "Age of the oldest row in the spool.", value=status.lag_seconds
        )
        yield CounterMetricFamily("sluice_events_stored_rows", "Rows in the database.", value=status.stored)
        yield CounterMetricFamily("sluice_spooled_rows", "Rows that went to the spool.", value=status.spooled)
        yield CounterMetricFamily("sluice_replayed_rows", "Rows that left it.", value=status.replayed)
        yield CounterMetricFamily("sluice_events_lost_rows", "Rows that nothing took.", value=status.lost)
