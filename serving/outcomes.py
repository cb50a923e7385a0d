"""What came of live exposures, arm by arm, as counters: events find the arms of the request that they name."""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque
from collections.abc import Collection, Sequence
from datetime import timedelta
from typing import Any

import msgspec
import sqlalchemy as sa

from serving.database import Database, Row, Unavailable, assignments, events, exposures
from serving.families import Counter
from serving.totals import SKEW

MOST_WAITING = 100_000
"""Events that wait to be looked up; of more, the oldest are left out of the counters, never out of the database."""
AT_ONCE = 500
EVERY_SECONDS = 1.0

Taken = tuple[str, int]
"""An event's id, and when it was received."""


class Outcomes:
    """Counts events by experiment, arm and type, a candidate's of each type once, in whichever process they came.

    The database tells: it has the exposures and events of all processes, and of an event that was sent twice it
    keeps the one that came first.

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
        query = sa.select(events).where(events.c.event_id.in_([name for name, _ in batch]))
        with self._database.reading() as connection:
            stored = {row.event_id: row for row in connection.execute(query)}
            first = {name for name, received in batch if name in stored and stored[name].received == received}
            counted = first - _repeated(connection, {stored[name].request_id for name in first})
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
                .where(events.c.event_id.in_(counted), exposures.c.served)
                .group_by(assignments.c.experiment, assignments.c.arm, events.c.type)
            )
            found = [(str(e), str(a), str(t), int(n)) for e, a, t, n in connection.execute(arms)]
        return [one for one in batch if one[0] not in stored], found


def _repeated(connection: sa.Connection, requests: Collection[str]) -> set[str]:
    """Return which events of some requests are not the first of their kind for their candidate."""
    about = exposures.c.request_id, exposures.c.time, exposures.c.exposure_id
    query = sa.select(*about).where(exposures.c.request_id.in_(requests), exposures.c.served)
    shown = {row.request_id: row for row in connection.execute(query.order_by(exposures.c.time))}
    if not shown:
        return set()
    since = min(row.time for row in shown.values()) - SKEW // timedelta(microseconds=1)
    among = sa.select(events).where(events.c.request_id.in_(requests), events.c.time >= since)
    groups: dict[tuple[str, str], list[Any]] = defaultdict(list)
    for row in connection.execute(among.order_by(events.c.received, events.c.event_id)):
        groups[row.request_id, row.type].append(row)
    both = {
        shown[request_id].exposure_id: request_id
        for (request_id, _), group in groups.items()
        if request_id in shown and len({one.candidate is None for one in group}) == 2
    }
    contents = sa.select(exposures.c.exposure_id, exposures.c.content).where(exposures.c.exposure_id.in_(both))
    places: dict[str, dict[str, int]] = defaultdict(dict)
    for row in connection.execute(contents) if both else ():
        for place, item in enumerate(msgspec.json.decode(row.content)["items"] or ()):
            places[both[row.exposure_id]].setdefault(item, place)
    repeated, seen = set(), set()
    for key, group in groups.items():
        for one in group:
            place = places[one.request_id].get(one.item, one.item) if one.candidate is None else one.candidate
            if (*key, place) in seen:
                repeated.add(one.event_id)
            seen.add((*key, place))
    return repeated
