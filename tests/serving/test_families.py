"""Families of the hot path show what prometheus_client's own would."""

from __future__ import annotations

import random

import prometheus_client
from prometheus_client import CollectorRegistry, generate_latest

from serving.families import Counter, Histogram


def shown(registry: CollectorRegistry) -> list[str]:
    return [line for line in generate_latest(registry).decode().splitlines() if "_created" not in line]


def test_a_histogram_shows_what_the_librarys_shows() -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    bounds = (0.1, 0.5, 1.0)
    one = Histogram("seconds", "Of a stage.", ["stage"], buckets=bounds, registry=ours)
    other = prometheus_client.Histogram("seconds", "Of a stage.", ["stage"], buckets=bounds, registry=theirs)
    make = random.Random(0)
    for _ in range(200):
        stage, value = make.choice(["read", 'a"b\n']), make.choice([0.05, 0.1, 0.3, 0.5, 1.0, 7.0])
        one.observe((stage,), value)
        other.labels(stage).observe(value)
    assert sorted(shown(ours)) == sorted(shown(theirs))


def test_what_has_no_labels_is_there_from_the_start() -> None:
    registry = CollectorRegistry()
    Histogram("rows", "Of a pass.", buckets=(1,), registry=registry)
    scored = Counter("scored", "Candidates.", registry=registry)
    assert registry.get_sample_value("rows_count") == registry.get_sample_value("scored_total") == 0
    scored.inc((), 7)
    assert registry.get_sample_value("scored_total") == 7


def test_a_counter_shows_what_the_librarys_shows() -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    one = Counter("requests", "Answered.", ["route", "status"], registry=ours)
    other = prometheus_client.Counter("requests", "Answered.", ["route", "status"], registry=theirs)
    for status in ("200", "200", "422"):
        one.inc(("/v1/score", status))
        other.labels("/v1/score", status).inc()
    one.inc(("/healthz", "200"), 5)
    other.labels("/healthz", "200").inc(5)
    assert shown(ours) == shown(theirs)
