"""Retention: what is older than a day leaves the database, exposures with all that hangs on them, never too early.

Exposures go from the oldest on, so that what is left is all that came since: the last touch of an event is the one
that it always was, or gone, and never an earlier one. The day is stored before the first of them goes. From then on
nothing of the time before is exported, and results that rest on it say so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from ctr_models.errors import DataError
from pipelines.features.progress import steps
from serving.analysis import stage
from serving.database import PRUNES, Database, assignments, events, experiments, exposures, matches
from serving.experiments import Experiments, state
from serving.export import SKEW, midnight, missing, stored_days
from serving.totals import QUERY_SECONDS, micros

HOLD_SECONDS = 0.05
"""That a transaction may take: so long a server's writer waits. Its size follows what the last one took."""
MOST_ROWS = 5000
PAGES = 1000
"""Of SQLite's file, that are given back at once."""
_KEY = ("experiment", "unit", "time", "exposure_id")
_DAY = timedelta(days=1)
_EPOCH = date(1970, 1, 1)
Key = tuple[Any, ...]
"""Of an exposure in an experiment."""


@dataclass(frozen=True)
class OldDay:
    """A day that would go.

    Args:
        day: in UTC.
        exposures, events: rows of it.
        missing: what of it no final partition holds; empty if one holds all, or if nobody asked.
    """

    day: str
    exposures: int
    events: int
    missing: str


@dataclass(frozen=True)
class Plan:
    """What would go, and what speaks against it.

    Args:
        before: the first day that stays.
        window: after an exposure, in which its events count.
        days: what would go.
        obstacles: why nothing may go, each with what to do about it.
        ended: experiments that are over and whose results would lack what goes.
    """

    before: date
    window: timedelta
    days: list[OldDay]
    obstacles: list[tuple[str, str]]
    ended: list[str]

    def check(self, name: str) -> None:
        """Let nothing go that is needed.

        Args:
            name: of the database.

        Raises:
            DataError: naming what needs it, and what to do.
        """
        if self.obstacles:
            problems, remedies = zip(*self.obstacles, strict=True)
            raise DataError(f"nothing is removed: {'; '.join(problems)}", where=name, remedy="; ".join(remedies))


@dataclass
class Pruned:
    """What went.

    Args:
        exposures, events: rows.
        assignments: exposures in experiments; one may be in several.
        freed_bytes: given back to the file system.
        spare_bytes: unused in SQLite's file, and used again by what comes.
    """

    exposures: int = 0
    events: int = 0
    assignments: int = 0
    freed_bytes: int = 0
    spare_bytes: int = 0


def plan(
    database: Database,
    before: date,
    *,
    exported: Path | None,
    window: timedelta = _DAY,
    despite_experiments: bool = False,
    now: datetime | None = None,
    shown: bool = False,
) -> Plan:
    """Look at what is older than a day, and whether somebody still needs it.

    Args:
        database: where exposures and events are.
        before: the first day that stays, in UTC.
        exported: folder of the partitions, in which each served exposure must stand, for good; None: need not.
        window: after an exposure, in which its events count.
        despite_experiments: running experiments may lose exposures that their results rest on.
        now: the time.
        shown: draw the progress.

    Raises:
        Unavailable: the database can't be read now.
    """
    moment = now or datetime.now(UTC)
    cut = midnight(before)
    obstacles: list[tuple[str, str]] = []
    last = (moment - window).astimezone(UTC).date()
    if before > last:
        hours = window / timedelta(hours=1)
        obstacles.append(
            (f"events of the {hours:g} hours after an exposure still count for some", f"prune before {last}")
        )
    with database.reading(seconds=QUERY_SECONDS) as connection:
        days = _old_days(connection, before, exported, shown)
    lacking = [f"{one.day} ({one.missing})" for one in days if one.missing]
    if lacking:
        named = ", ".join(lacking[:3]) + (f" and {len(lacking) - 3} more days" if len(lacking) > 3 else "")
        obstacles.append(
            (f"{exported} lacks {named}", f"run sluice events export --out {exported}, or give --without-export")
        )
    needed, ended = _needs(database, cut, moment)
    if needed and not despite_experiments:
        obstacles += needed
    return Plan(before, window, days, obstacles, ended)


def prune(
    database: Database,
    what: Plan,
    *,
    shown: bool = False,
    pause: Callable[[float], None] = time.sleep,
) -> Pruned:
    """Remove what a plan says, from the oldest on. Whoever is killed over it goes on by doing it again.

    Each transaction removes some exposures with their rows in experiments, and the events before them; after each,
    others may write for as long as it took.

    Args:
        database: where exposures and events are.
        what: to remove.
        shown: draw the progress.
        pause: waits some seconds.

    Raises:
        DataError: something of it is needed.
        Unavailable: the database can't be written now; what went is gone.

    Example:
        >>> import tempfile
        >>> database = Database(f"sqlite:///{tempfile.mkdtemp()}/events.db")
        >>> database.create()
        >>> old = {"event_id": "e1", "time": 0, "received": 0, "type": "click"}
        >>> database.insert([("sluice_events", old)])
        >>> prune(database, plan(database, date(2000, 1, 1), exported=None)).events
        1
    """
    what.check(database.name)
    done = Pruned()
    cut = midnight(what.before)
    database.create()  # the table that the next line writes may be younger than the database
    database.insert([(PRUNES, {"before": cut, "began": time.time_ns() // 1000})])
    names = _assigned(database)
    pace = _Pace(database, pause)
    at = came = 0  # what went leaves traces in the indices until they are swept: look behind them
    with steps(shown) as step:
        told = step("pruning", sum(day.exposures + day.events for day in what.days))
        beyond = _beyond(database, cut, what.window)
        while beyond:
            some, beyond = beyond[: pace.rows], beyond[pace.rows :]
            with pace.transaction() as connection:
                done.events += _delete(connection, events.c.event_id, some)
        while True:
            batch, upto = _oldest(database, at, cut, pace.rows)
            old = _old_events(database, came, upto - SKEW, pace.rows)
            if not batch and not old:
                break
            keys = _keys_of(database, batch, names)
            with pace.transaction() as connection:
                done.assignments += _delete_keys(connection, keys)
                done.exposures += _delete(connection, exposures.c.exposure_id, [row.exposure_id for row in batch])
                done.events += _delete(connection, events.c.event_id, [row.event_id for row in old])
            at, came = batch[-1].time if batch else at, old[-1].time if old else came
            told(len(batch) + len(old))
        while keys := _orphans(database, cut):
            for start in range(0, len(keys), 100):
                with pace.transaction() as connection:
                    done.assignments += _delete_keys(connection, keys[start : start + 100])
    done.freed_bytes, done.spare_bytes = _give_back(database, pause)
    return done


class _Pace:
    """Transactions of a size that takes :data:`HOLD_SECONDS`, and pauses in which others write."""

    def __init__(self, database: Database, pause: Callable[[float], None]) -> None:
        self._database, self._pause = database, pause
        self.rows = 100

    @contextmanager
    def transaction(self) -> Iterator[sa.Connection]:
        """Give a connection whose changes are made at the end; then let others write for as long."""
        with self._database.writing() as connection:
            begin = time.perf_counter()  # the lock is held from here on
            yield connection
        took = time.perf_counter() - begin
        self.rows = max(10, min(MOST_ROWS, 2 * self.rows, round(self.rows * HOLD_SECONDS / max(took, 1e-6))))
        self._pause(took)


def _old_days(connection: sa.Connection, before: date, exported: Path | None, shown: bool) -> list[OldDay]:
    cut, day_micros = midnight(before), _DAY // timedelta(microseconds=1)
    days = {day: 0 for day in stored_days(connection, before=cut)}
    number = (events.c.time // day_micros).label("number")
    query = sa.select(number, sa.func.count()).where(events.c.time < cut - SKEW).group_by(number)
    happened = {_EPOCH + timedelta(days=int(n)): int(count) for n, count in connection.execute(query)}
    found = []
    with steps(shown) as step:
        told = step("looking", len(days.keys() | happened))
        for day in sorted(days.keys() | happened):
            within = exposures.c.time >= midnight(day), exposures.c.time < midnight(day + _DAY)
            count = connection.execute(sa.select(sa.func.count()).where(*within)).scalar_one()
            lack = missing(connection, exported, day) if exported is not None and count else ""
            found.append(OldDay(day.isoformat(), int(count), happened.get(day, 0), lack))
            told(1)
    return found


def _needs(database: Database, cut: int, now: datetime) -> tuple[list[tuple[str, str]], list[str]]:
    """Return what running experiments say against it, and those that are over and would lack something."""
    kept = Experiments(database)
    kept.refresh()
    known = {told["experiment"]["name"] for told in kept.list()}
    needed, ended = [], []
    for (name,) in database.rows(sa.select(experiments.c.name).distinct().order_by(experiments.c.name)):
        if name not in known:
            needed.append((f"experiment {name!r} can't be read by this release", "use the release that made it"))
            continue
        since, _ = stage(kept.versions(name), kept.pause_log(name), now)
        if since is None or not _has(database, name, micros(since), cut):
            continue
        if state(kept.get(name), now) == "ended":
            ended.append(name)
        else:
            day = since.astimezone(UTC).date()
            needed.append(
                (
                    f"experiment {name!r}, whose results count from {since:%Y-%m-%d %H:%M} UTC on, still runs",
                    f"prune before {day}, end it, or give --despite-experiments",
                )
            )
    return needed, ended


def _has(database: Database, experiment: str, since: int, cut: int) -> bool:
    """Tell whether an experiment has exposures in a span of time."""
    within = assignments.c.experiment == experiment, assignments.c.time >= since, assignments.c.time < cut
    return bool(_rows(database, sa.select(assignments.c.time).where(*within).limit(1)))


def _beyond(database: Database, cut: int, window: timedelta) -> list[str]:
    """Return the events that name requests which go, though they are younger themselves."""
    goes, stays = exposures.alias(), exposures.alias()
    query = sa.select(events.c.event_id).where(
        events.c.time >= cut - SKEW,
        events.c.time < cut + window // timedelta(microseconds=1),
        sa.exists().where(goes.c.request_id == events.c.request_id, goes.c.time < cut),
        ~sa.exists().where(stays.c.request_id == events.c.request_id, stays.c.time >= cut),
    )
    return [row.event_id for row in _rows(database, query)]


def _oldest(database: Database, at: int, cut: int, most: int) -> tuple[Sequence[Any], int]:
    """Return the oldest exposures from a moment on, and the moment up to which that is all."""
    query = sa.select(exposures.c.exposure_id, exposures.c.request_id, exposures.c.time)
    within = exposures.c.time >= at, exposures.c.time < cut
    batch = _rows(database, query.where(*within).order_by(exposures.c.time).limit(most))
    return batch, batch[-1].time if len(batch) == most else cut


def _old_events(database: Database, at: int, upto: int, most: int) -> Sequence[Any]:
    """Return the oldest events of a span."""
    query = sa.select(events.c.event_id, events.c.time).where(events.c.time >= at, events.c.time < upto)
    return _rows(database, query.order_by(events.c.time).limit(most))


def _assigned(database: Database) -> list[str]:
    """Return the experiments that have exposures, by one seek each."""
    found: list[str] = []
    query = first = sa.select(sa.func.min(assignments.c.experiment))
    while (name := database.rows(query)[0][0]) is not None:
        found.append(name)
        query = first.where(assignments.c.experiment > name)
    return found


def _keys_of(database: Database, batch: Sequence[Any], names: Sequence[str]) -> list[Key]:
    """Return the keys of exposures in experiments."""
    if not batch or not names:
        return []
    ids = {row.exposure_id for row in batch}
    found = sa.select(*(assignments.c[name] for name in _KEY)).where(
        assignments.c.request_id.in_({row.request_id for row in batch}),
        assignments.c.experiment.in_(names),  # so that the index leads to the time, however often an id was used
        assignments.c.time >= batch[0].time,
        assignments.c.time <= batch[-1].time,
    )
    return [tuple(row) for row in _rows(database, found) if row.exposure_id in ids]


def _orphans(database: Database, cut: int) -> list[Key]:
    """Return keys that no exposure has: a spool may bring them after it went."""
    found: set[Key] = set()
    for table in (assignments, matches):
        alone = ~sa.exists().where(exposures.c.exposure_id == table.c.exposure_id)
        query = sa.select(*(table.c[name] for name in _KEY)).where(table.c.time < cut, alone).distinct()
        found |= {tuple(row) for row in _rows(database, query.limit(MOST_ROWS))}
    return list(found)


def _rows(database: Database, query: sa.Select[Any]) -> Sequence[Any]:
    with database.reading(seconds=QUERY_SECONDS) as connection:
        return connection.execute(query).all()


def _delete(connection: sa.Connection, column: sa.Column[Any], values: Sequence[Any]) -> int:
    return connection.execute(sa.delete(column.table).where(column.in_(values))).rowcount if values else 0


def _delete_keys(connection: sa.Connection, keys: Sequence[Key]) -> int:
    """Remove exposures from experiments; return how many there were."""
    values = [{f"its_{name}": value for name, value in zip(_KEY, key, strict=True)} for key in keys]
    for table in (matches, assignments) if keys else ():
        same = sa.and_(*(table.c[name] == sa.bindparam(f"its_{name}") for name in _KEY))
        connection.execute(sa.delete(table).where(same), values)
    return len(keys)


def _give_back(database: Database, pause: Callable[[float], None]) -> tuple[int, int]:
    """Return the bytes that went back to the file system, and those that are left unused in the file."""
    whole, possible = database.spare()
    spare = whole
    while possible and spare:
        begin = time.perf_counter()
        database.give_back(PAGES)
        pause(time.perf_counter() - begin)
        before, (spare, _) = spare, database.spare()
        if spare >= before:
            break
    return max(0, whole - spare), spare
