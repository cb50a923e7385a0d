"""How much a database keeps, and since when, as metrics."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import suppress

import sqlalchemy as sa
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from serving.database import Database, Unavailable, exposures

SECONDS = 60.0
"""Between two looks."""


class Kept(Collector):
    """How much the database keeps, and since when: looked up now and then, whoever asks.

    Args:
        database: where exposures and events are.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._found: tuple[int, int | None] | None = None

    async def watch(self) -> None:
        """Look until cancelled; while the database is away, what was last known holds."""
        while True:
            with suppress(Unavailable):
                self._found = await asyncio.to_thread(self._look)
            await asyncio.sleep(SECONDS)

    def describe(self) -> Iterator[GaugeMetricFamily]:
        """Return the families without values."""
        yield GaugeMetricFamily("sluice_events_bytes", "Of the database, on disk.")
        yield GaugeMetricFamily("sluice_events_oldest_timestamp_seconds", "Time of the oldest exposure.")

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Return the families."""
        if self._found is None:
            return
        size, oldest = self.describe()
        size.add_metric([], self._found[0])
        yield size
        if self._found[1] is not None:
            oldest.add_metric([], self._found[1] / 1e6)
            yield oldest

    def _look(self) -> tuple[int, int | None]:
        ((oldest,),) = self._database.rows(sa.select(sa.func.min(exposures.c.time)))
        return self._database.size(), oldest
