"""Events find the arms of the request that they name, each once, whichever database holds them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from pipelines.experiments.experiment import Arm
from serving.database import EVENTS, Database, Row
from serving.events import assigned, exposure
from serving.families import Counter
from serving.outcomes import Outcomes
from serving.router import Assignment
from serving.schemas import ModelCard

CARD = ModelCard(name="clicks", version=3, hash="ab", gates={})


def event(name: str, request: str | None, kind: str = "click", received: int = 5, **more: Any) -> Row:
    values = {"event_id": name, "time": time.time_ns() // 1000, "received": received, "type": kind}
    return EVENTS, {**values, "request_id": request, "unit": "7", **(more or {"item": "a"})}


def shown(request: str, arm: str, shadow: tuple[str, str] | None = None, items: str = "a") -> list[Row]:
    dealt = (Assignment("gates", "7", Arm(name=arm), (), 0.0), Assignment("prices", "7", Arm(name="low"), (), 0.0))
    given: Any = ({"user_id": 7}, {}, [{"item_id": item} for item in items])
    scores = np.linspace(0.5, 0.1, len(items), dtype=np.float32)
    row = exposure(
        request_id=request,
        given=given,
        scores=scores,
        card=CARD,
        schema_hash="ef",
        item="item_id",
        assignments=dealt,
        shadow=shadow,
    )
    return [row, *assigned(row, dealt, len(items), shadow=shadow)]


@pytest.fixture
def database(events_url: str) -> Iterator[Database]:
    database = Database(events_url)
    database.create()
    yield database
    database.close()


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def outcomes(database: Database, registry: CollectorRegistry) -> Outcomes:
    labels = ["experiment", "arm", "type"]
    return Outcomes(database, Counter("sluice_arm_events", "Events.", labels, registry=registry))


def count(registry: CollectorRegistry, experiment: str, arm: str, kind: str = "click") -> float:
    labels = {"experiment": experiment, "arm": arm, "type": kind}
    return registry.get_sample_value("sluice_arm_events_total", labels) or 0.0


def test_events_count_for_the_arms_of_their_request(
    database: Database, registry: CollectorRegistry, outcomes: Outcomes
) -> None:
    database.insert([*shown("r1", "open"), *shown("r2", "gated"), *shown("r1", "idle", shadow=("gates", "idle"))])
    rows = [event("e1", "r1"), event("e2", "r2"), event("e3", "r2", "conversion"), event("e4", "gone")]
    database.insert(rows)
    outcomes.took([*rows, event("e5", None)])
    asyncio.run(outcomes.count())
    assert (count(registry, "gates", "open"), count(registry, "gates", "gated")) == (1, 1)
    assert (count(registry, "prices", "low"), count(registry, "gates", "gated", "conversion")) == (2, 1)
    assert count(registry, "gates", "idle") == 0  # it scored, and served nobody
    asyncio.run(outcomes.count())
    assert count(registry, "gates", "open") == 1


def test_an_event_that_was_sent_twice_counts_once(
    database: Database, registry: CollectorRegistry, outcomes: Outcomes
) -> None:
    database.insert([*shown("r1", "open"), event("e1", "r1", received=5), event("e1", "r1", received=9)])
    outcomes.took([event("e1", "r1", received=9), event("e1", "r1", received=5), event("e1", "r1", received=5)])
    asyncio.run(outcomes.count())
    assert count(registry, "gates", "open") == 1


def test_an_event_of_a_request_that_was_sent_again_counts_once(
    database: Database, registry: CollectorRegistry, outcomes: Outcomes
) -> None:
    database.insert([*shown("r1", "open"), *shown("r1", "open"), event("e1", "r1")])
    outcomes.took([event("e1", "r1")])
    asyncio.run(outcomes.count())
    assert count(registry, "gates", "open") == 1


def test_a_candidate_counts_once_however_often_and_however_it_is_named(
    database: Database, registry: CollectorRegistry, outcomes: Outcomes
) -> None:
    database.insert([*shown("r1", "open", items="abca"), *shown("r2", "open", items="ab")])
    clicks = [
        event("place", "r1", candidate=1),
        event("item", "r1", item="b", received=6),
        event("again", "r1", candidate=1, received=7),
        event("first", "r1", item="a"),
        event("no candidate", "r1", item="x"),
        event("other", "r2", item="b"),
        event("kind", "r1", "conversion", item="b"),
    ]
    for rows in (clicks[2:], clicks[:2]):  # of two processes: who comes last may be heard of first
        database.insert(rows)
    for rows in (clicks[2:], clicks[:2]):
        outcomes.took(rows)
        asyncio.run(outcomes.count())
    assert (count(registry, "gates", "open"), count(registry, "gates", "open", "conversion")) == (4, 1)
    late = [event("late", "r1", candidate=0, received=8), event("new", "r1", candidate=2, received=9)]
    database.insert(late)
    outcomes.took(late)
    asyncio.run(outcomes.count())
    assert count(registry, "gates", "open") == 5


def test_what_is_still_in_a_spool_is_counted_later(
    database: Database, registry: CollectorRegistry, outcomes: Outcomes
) -> None:
    database.insert(shown("r1", "open"))
    outcomes.took([event("e1", "r1")])
    asyncio.run(outcomes.count())
    assert count(registry, "gates", "open") == 0
    database.insert([event("e1", "r1")])
    asyncio.run(outcomes.count())
    assert count(registry, "gates", "open") == 1


def test_a_database_that_is_away_delays_the_count(tmp_path: Path, registry: CollectorRegistry) -> None:
    database = Database(f"sqlite:///{tmp_path}/events.db")
    outcomes = Outcomes(
        database, Counter("sluice_arm_events", "E.", ["experiment", "arm", "type"], registry=registry)
    )
    outcomes.took([event("e1", "r1")])
    asyncio.run(outcomes.count())
    database.create()
    database.insert([*shown("r1", "open"), event("e1", "r1")])
    asyncio.run(outcomes.count())
    outcomes.close()
    assert count(registry, "gates", "open") == 1
