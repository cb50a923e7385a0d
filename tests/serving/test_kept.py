"""How much is kept: sampled, and as it last was while the database is away."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from serving import kept as module
from serving.database import Database
from serving.kept import Kept
from tests.serving.live_log import micros, shown


async def looked(kept: Kept) -> None:
    """Let it look some times."""
    watching = asyncio.create_task(kept.watch())
    await asyncio.sleep(0.3)
    assert not watching.done()
    watching.cancel()


def test_it_tells_the_size_and_the_oldest(events_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SECONDS", 0.01)
    database, registry = Database(events_url), CollectorRegistry()
    kept = Kept(database)
    registry.register(kept)

    def told(name: str) -> Any:
        return registry.get_sample_value(f"sluice_events_{name}")

    asyncio.run(looked(kept))  # there are no tables
    assert told("bytes") is None and told("oldest_timestamp_seconds") is None
    database.create()
    asyncio.run(looked(kept))
    empty = told("bytes")
    assert empty > 0 and told("oldest_timestamp_seconds") is None
    database.insert([shown("r1", 1, "ab" * 1000), shown("r0", 0)])
    asyncio.run(looked(kept))
    assert told("bytes") > empty + 10_000 and told("oldest_timestamp_seconds") == micros(0) / 1e6
    database.close()


def test_while_the_database_is_away_the_last_figures_hold(tmp_path: Path) -> None:
    path = tmp_path / "events.db"
    database = Database(f"sqlite:///{path}")
    database.create()
    kept = Kept(database)
    asyncio.run(looked(kept))
    before = [family.samples for family in kept.collect()]
    database.close()
    path.unlink()
    asyncio.run(looked(kept))
    assert before and [family.samples for family in kept.collect()] == before
