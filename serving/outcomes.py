"""What came of live exposures, arm by arm, as counters: events find the arms of the request that they name."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence

import sqlalchemy as sa

from serving.database import Database, Row, Unavailable, assignments, events, exposures
from serving.families import Counter

MOST_WAITING = 100_000
"""Events that wait to be looked up; of more, the oldest are left out of the counters, never out of the database."""
AT_ONCE = 500
EVERY_SECONDS = 1.0

Taken = tuple[str, int]
"""An event's id, and when it was received."""


class Outcomes:
    """Counts events by experiment, arm and type, each once, in whichever process it arrived.

    The database tells: it has the exposures of all processes, and of an event that was sent twice it keeps the one
    that came first.

    Args:
        database: where exposures and events are.
        counter: with labels experiment, arm, type.
    """

    def __init__(self, database: Database, counter: Counter) -> None:
        self._database, self._counter = database, counter
        self._waiting: deque[Taken] = deque(maxlen=MOST_WAITING)

    def took(self, rows: Sequence[Row]) -> None:
        """Count events later that have just been acknowledged."""
        for _, event in rows:
            if event["request_id"] is not None:
                self._waiting.append((event["event_id"], event["received"]))

    async def watch(self) -> None:
        """Count what comes, until cancelled."""
        while True:
            await asyncio.sleep(EVERY_SECONDS)
            await self.count()

    async def count(self) -> None:
        """Count what waits and is in the database; what is still in a spool waits on."""
        for _ in range(-(-len(self._waiting) // AT_ONCE)):
            batch = [self._waiting.popleft() for _ in range(min(AT_ONCE, len(self._waiting)))]
            try:
                missing, found = await asyncio.to_thread(self._look, batch)
            except Unavailable:
                self._waiting.extend(batch)
                return
            self._waiting.extend(missing)
            for experiment, arm, kind, count in found:
                self._counter.inc((experiment, arm, kind), count)

    def close(self) -> None:
        """Let go of the database."""
        self._database.close()

    def _look(self, batch: Sequence[Taken]) -> tuple[list[Taken], list[tuple[str, str, str, int]]]:
        """Return the events that are not stored yet, and counts of the others by experiment, arm and type."""
        query = sa.select(events.c.event_id, events.c.received).where(
            events.c.event_id.in_([name for name, _ in batch])
        )
        with self._database.reading() as connection:
            stored = {row.event_id: row.received for row in connection.execute(query)}
            first = [name for name, received in set(batch) if stored.get(name) == received]
            arms = (
                # A request that was sent again has several exposures; its events count once.
                sa.select(
                    assignments.c.experiment,
                    assignments.c.arm,
                    events.c.type,
                    sa.func.count(events.c.event_id.distinct()),
                )
                .select_from(events)
                .join(assignments, assignments.c.request_id == events.c.request_id)
                .join(exposures, exposures.c.exposure_id == assignments.c.exposure_id)
                .where(events.c.event_id.in_(first), exposures.c.served)
                .group_by(assignments.c.experiment, assignments.c.arm, events.c.type)
            )
            found = [(str(e), str(a), str(t), int(n)) for e, a, t, n in connection.execute(arms)]
        return [one for one in batch if one[0] not in stored], found
