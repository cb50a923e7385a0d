"""Exposures and events as the training set of the next day: one row a candidate that was shown, with its label."""

from __future__ import annotations

import json
import logging
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import polars as pl
import sqlalchemy as sa

from ctr_models.errors import DataError
from pipelines.features.files import atomic_directory
from pipelines.features.progress import Step, steps
from serving import totals
from serving.database import REMEDY, Database, Unavailable, events, exposures, horizon

log = logging.getLogger("sluice.events")
MANIFEST = "_manifest.json"
SKEW = totals.SKEW // timedelta(microseconds=1)
CHUNK_ROWS = 100_000
"""Candidates that are held in memory at once."""
TYPES = ("click", "conversion", "skip")
_DAY = 86_400_000_000
_EPOCH = date(1970, 1, 1)


@dataclass
class Day:
    """What was written of a day.

    Args:
        day: of the exposures, in UTC.
        final: whatever happens now is too late to count.
        exposures, rows: requests and candidates.
        clicks, conversions, skips: candidates that have them.
        unmatched: events of the day that found no exposure.
        files: names of the data files.
        stored, events: exposures and events that the database had of the span that was looked at, those around the
            day and of shadow arms too. If it has more by now, some came late.
        since, until: the span, in microseconds since 1970.
    """

    day: str
    final: bool
    exposures: int = 0
    rows: int = 0
    clicks: int = 0
    conversions: int = 0
    skips: int = 0
    unmatched: int = 0
    files: list[str] = field(default_factory=list)
    stored: int = 0
    events: int = 0
    since: int = 0
    until: int = 0


def partition(out: Path, day: date) -> Path:
    """Return the folder of a day."""
    return Path(out) / f"day={day.isoformat()}"


def export(
    database: Database,
    out: Path,
    *,
    days: Sequence[date] | None = None,
    window: timedelta = timedelta(days=1),
    label: str = "click",
    timestamp: str = "time",
    again: bool = False,
    now: datetime | None = None,
    shown: bool = False,
) -> list[Day]:
    """Write a partition of Parquet for each day that has exposures.

    An event counts for the exposure that it names; one that names a unit and an item, for the last exposure of
    both before it; in either case if it comes within the window. A partition appears whole, or not at all, and
    takes the place of its earlier version; one that is final is left as it is, unless exposures or events came
    late. Days whose exposures were removed from the database are left as they are, whatever is left of them.

    Columns are those of the requests, as they were scored; one that is a list in some of them is a list in all, in
    which a single value stands alone. Beside them stand the label, 1 if there was a click; ``conversion``,
    ``skip`` and ``value``; the timestamp; and, under names that begin with ``served_``, how it was served.

    Args:
        database: where exposures and events are.
        out: folder for the partitions.
        days: in UTC; None: all that have exposures.
        window: after an exposure, in which its events count.
        label: name of the label's column.
        timestamp: name of the column of the exposure's time.
        again: write final partitions anew, too.
        now: the time.
        shown: draw the progress.

    Returns:
        what was written, a day each.

    Raises:
        DataError: a request has a column of a name that is needed, the exposures of one of ``days`` were removed,
            or the database can't be read.
    """
    moment = now or datetime.now(UTC)
    span = window // timedelta(microseconds=1)
    written = []
    try:
        with steps(shown) as step:
            if days is None:
                with database.reading(seconds=totals.QUERY_SECONDS) as connection:
                    asked = stored_days(connection)
            else:
                asked = list(days)
            for day in asked:
                with database.reading(seconds=totals.QUERY_SECONDS) as connection:
                    start = midnight(day)
                    if start < horizon(connection):
                        _leave(connection, database.name, day, asked=days is not None)
                    elif again or not _settled(connection, partition(out, day)):
                        written += _export_day(connection, out, day, span, moment, (label, timestamp), step)
    except Unavailable as error:
        raise DataError(f"the database can't be read ({error})", where=database.name, remedy=REMEDY) from None
    return written


def missing(connection: sa.Connection, out: Path, day: date) -> str:
    """Say what of a day is in the database and not in its partition, for good; empty if nothing is.

    Args:
        connection: to the database.
        out: folder of the partitions.
        day: in UTC.
    """
    folder, start = partition(out, day), midnight(day)
    told = _manifest(folder)
    stored = sa.select(exposures.c.exposure_id).where(exposures.c.served, _within(start, start + _DAY))
    ids = {row.exposure_id for row in connection.execute(stored, execution_options={"yield_per": 10_000})}
    if told is None:
        return "not exported" if ids else ""
    if not told["final"]:
        return "exported, but not final"
    try:
        files = [pl.scan_parquet(folder / name).select("served_exposure_id") for name in told["files"]]
        ids -= set(pl.concat(files).unique().collect()["served_exposure_id"])
    except (OSError, pl.exceptions.PolarsError) as error:
        return f"exported, but not to be read ({type(error).__name__})"
    if ids:
        return f"exported without {len(ids):,} of its exposures"
    return "" if _settled(connection, folder) else "exported before some of its events came"


def stored_days(connection: sa.Connection, before: int | None = None) -> list[date]:
    """Return the days that have exposures, by one seek each."""
    found: list[date] = []
    first = sa.select(sa.func.min(exposures.c.time))
    query = first if before is None else first.where(exposures.c.time < before)
    while (at := connection.execute(query).scalar()) is not None:
        found.append(_EPOCH + timedelta(days=at // _DAY))
        query = first.where(_within(midnight(found[-1]) + _DAY, before))
    return found


def midnight(day: date) -> int:
    """Return the moment when a day begins, in UTC, in microseconds since 1970."""
    return (day - _EPOCH).days * _DAY


def _export_day(
    connection: sa.Connection,
    out: Path,
    day: date,
    span: int,
    now: datetime,
    names: tuple[str, str],
    step: Step,
) -> list[Day]:
    start = midnight(day)
    since, until = start - span - SKEW, start + _DAY + span
    told = Day(day.isoformat(), final=now.timestamp() * 1e6 > until, since=since, until=until)
    total = _count(connection, exposures.c.served, _within(start, start + _DAY))
    if not total:
        return []
    told.stored, told.events = _stored(connection, since, until)
    credit = _credits(connection, start, span, told)
    with atomic_directory(partition(out, day)) as aside:
        _write(connection, start, credit, told, aside, names, step(told.day, total))
        (aside / MANIFEST).write_text(json.dumps(asdict(told), indent=1) + "\n", encoding="utf-8")
    return [told]


def _leave(connection: sa.Connection, name: str, day: date, *, asked: bool) -> None:
    """Tell of a day that may not be written any more: it would take the place of a partition that has all of it."""
    problem = f"exposures of {day} were pruned"
    if asked:
        raise DataError(problem, where=name, remedy="its partition stays as it is; leave out --day")
    start = midnight(day)
    left = _count(connection, exposures.c.served, _within(start, start + _DAY))
    log.warning("%s; %d that are there are not exported", problem, left)


def _manifest(folder: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return found


def _settled(connection: sa.Connection, folder: Path) -> bool:
    """Tell whether a partition is final and nothing of its day came after it was written."""
    told = _manifest(folder)
    if told is None or not told["final"]:
        return False
    if not told.get("until"):  # written by a release that did not count
        return True
    stored, seen = _stored(connection, told["since"], told["until"])
    return stored <= int(told["stored"]) and seen <= int(told["events"])


def _stored(connection: sa.Connection, since: int, until: int) -> tuple[int, int]:
    """Count exposures and events of a span, in the indices of their times."""
    shown = _count(connection, _within(since, until))
    return shown, _count(connection, events.c.time >= since, events.c.time < until)


def _count(connection: sa.Connection, *conditions: sa.ColumnElement[bool]) -> int:
    return int(connection.execute(sa.select(sa.func.count()).where(*conditions)).scalar_one())


def _within(start: int, stop: int | None) -> sa.ColumnElement[bool]:
    return sa.and_(exposures.c.time >= start, sa.true() if stop is None else exposures.c.time < stop)


@dataclass
class _Credits:
    """Events by the exposure that they count for: by the candidate's place, and by its item."""

    by_place: dict[tuple[str, int], list[Any]] = field(default_factory=lambda: defaultdict(list))
    by_item: dict[tuple[str, str], list[Any]] = field(default_factory=lambda: defaultdict(list))


def _credits(connection: sa.Connection, start: int, span: int, told: Day) -> _Credits:
    """Find the exposure of each event that may count for the day."""
    query = sa.select(events).where(events.c.time >= start - SKEW, events.c.time < start + _DAY + span)
    named: dict[str, list[Any]] = defaultdict(list)
    later: dict[tuple[str, str], list[Any]] = defaultdict(list)
    for event in connection.execute(query, execution_options={"yield_per": 1000}):
        if event.request_id is not None:
            named[event.request_id].append(event)
        else:
            later[event.unit, event.item].append(event)
    # Exposures after the day are read as well: the last touch of an event of the day after may be one of those.
    shown: dict[str, list[tuple[int, str]]] = defaultdict(list)
    touched: dict[tuple[str, str], list[tuple[int, str]]] = defaultdict(list)
    units = {unit for unit, _ in later}
    columns = [exposures.c.exposure_id, exposures.c.time, exposures.c.request_id, exposures.c.unit]
    stop = start + _DAY + span
    query = sa.select(*columns, *([exposures.c.content] if later else [])).where(
        exposures.c.served, _within(start - span - SKEW, stop)
    )
    for row in connection.execute(query.order_by(exposures.c.time), execution_options={"yield_per": 1000}):
        if row.request_id in named:
            shown[row.request_id].append((row.time, row.exposure_id))
        if row.unit in units:
            for item in set(msgspec.json.decode(row.content)["items"] or ()):
                if (row.unit, item) in later:
                    touched[row.unit, item].append((row.time, row.exposure_id))
    found = _Credits()
    for request_id, of_request in named.items():
        for event in of_request:
            exposure_id = _last(shown[request_id], event.time, span, SKEW)
            if exposure_id is None:
                told.unmatched += start <= event.time < start + _DAY
            elif event.candidate is not None:
                found.by_place[exposure_id, event.candidate].append(event)
            else:
                found.by_item[exposure_id, event.item].append(event)
    for (unit, item), of_both in later.items():
        for event in of_both:
            exposure_id = _last(touched[unit, item], event.time, span, 0)
            if exposure_id is None:
                told.unmatched += start <= event.time < start + _DAY
            else:
                found.by_item[exposure_id, item].append(event)
    return found


def _last(shown: Sequence[tuple[int, str]], at: int, span: int, skew: int) -> str | None:
    """Return the last exposure before a moment, if it is within the window."""
    place = bisect_right(shown, at, key=lambda one: one[0])
    if place == 0:
        place = bisect_right(shown, at + skew, key=lambda one: one[0]) and 1
    if place == 0 or shown[place - 1][0] + span < at:
        return None
    return shown[place - 1][1]


def _write(
    connection: sa.Connection,
    start: int,
    credit: _Credits,
    told: Day,
    folder: Path,
    names: tuple[str, str],
    done: Callable[[int], None],
) -> None:
    label, timestamp = names
    query = sa.select(exposures).where(exposures.c.served, _within(start, start + _DAY))
    result = connection.execution_options(yield_per=1000).execute(
        query.order_by(exposures.c.time, exposures.c.exposure_id)
    )
    chunks = folder / "chunks"
    chunks.mkdir()
    paths: list[Path] = []

    def flush(rows: list[dict[str, Any]]) -> None:
        # Another chunk may bring wider types: they meet when the chunks are put together.
        many = {name for row in rows for name, value in row.items() if type(value) is list}
        for row in rows:
            for name in many.intersection(row):
                if row[name] is not None and type(row[name]) is not list:
                    row[name] = [row[name]]
        path = chunks / f"{len(paths):06}.parquet"
        frame = pl.DataFrame(rows, infer_schema_length=None, strict=False)
        frame.write_parquet(path, compression="lz4")
        paths.append(path)
        told.rows += len(rows)
        told.clicks += int(frame[label].sum())
        told.conversions += int(frame["conversion"].sum())
        told.skips += int(frame["skip"].sum())

    rows: list[dict[str, Any]] = []
    for exposure in result:
        told.exposures += 1
        done(1)
        rows.extend(_rows(exposure, credit, label, timestamp))
        if len(rows) >= CHUNK_ROWS:
            flush(rows)
            rows = []
    if rows:
        flush(rows)
    name = "part-00000.parquet"
    whole = pl.concat(_listed([pl.scan_parquet(path) for path in paths]), how="diagonal_relaxed")
    whole.with_columns(pl.from_epoch(timestamp, "us")).sink_parquet(folder / name, compression="lz4")
    for path in paths:
        path.unlink()
    chunks.rmdir()
    told.files.append(name)


def _listed(parts: list[pl.LazyFrame]) -> list[pl.LazyFrame]:
    """Make each column a list in all parts that is one in some."""
    schemas = [part.collect_schema() for part in parts]
    many = {name for schema in schemas for name, dtype in schema.items() if dtype == pl.List}
    return [
        part.with_columns(
            pl.when(pl.col(name).is_not_null()).then(pl.concat_list(name))
            for name in sorted(many.intersection(schema.names()))
            if schema[name] not in (pl.List, pl.Null)
        )
        for part, schema in zip(parts, schemas, strict=True)
    ]


def _rows(exposure: Any, credit: _Credits, label: str, timestamp: str) -> Iterator[dict[str, Any]]:
    content = msgspec.json.decode(exposure.content)
    items = content["items"] or [None] * len(content["candidates"])
    situation = {**content["user"], **content["context"]}
    about = {
        "served_exposure_id": exposure.exposure_id,
        "served_request_id": exposure.request_id,
        "served_unit": exposure.unit,
        "served_experiment": exposure.experiment,
        "served_arm": exposure.arm,
        "served_model": exposure.model,
        "served_model_hash": exposure.model_hash,
        "served_schema_hash": exposure.schema_hash,
        "served_gates": exposure.gates,
        "served_assignments": json.dumps(content["assignments"], sort_keys=True),
    }
    credited: set[str] = set()
    for place, candidate in enumerate(content["candidates"]):
        found = list(credit.by_place.get((exposure.exposure_id, place), ()))
        if items[place] is not None and items[place] not in credited:
            of_item = credit.by_item.get((exposure.exposure_id, items[place]), ())
            found += of_item
            if of_item:  # an item that stands there twice has its events once
                credited.add(items[place])
        given = {**situation, **candidate}
        kinds = {event.type for event in found}
        values = [event.value for event in found if event.value is not None]
        row = {
            label: int("click" in kinds),
            "conversion": int("conversion" in kinds),
            "skip": int("skip" in kinds),
            "value": float(sum(values)) if values else None,
            timestamp: exposure.time,
            **about,
            "served_candidate": place,
            "served_score": content["scores"][place],
            "served_position": content["positions"][place],
            "served_propensity": content["propensities"][place],
        }
        for name in row:
            if name in given:
                raise DataError(
                    f"a request brings a column {name!r}, which the export needs for itself",
                    where=f"request {exposure.request_id}",
                    remedy="give other names with --label and --timestamp, or rename the feature",
                )
        yield {**given, **row}
