"""What came of an experiment's exposures, summed by unit and arm inside the database."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

from pipelines.experiments.rates import NOTHING, Sums
from serving.database import Database, assignments, events, exposures

SKEW = timedelta(minutes=5)
"""How far a client's clock may be behind: its events then seem to come before what they follow."""
QUERY_SECONDS = 600.0
_COUNTS = ("units", "requests", "shown", "clicks", "conversions")


@dataclass(frozen=True)
class Span:
    """Which exposures of an experiment count, and which events; times are microseconds since 1970.

    Args:
        experiment: its name.
        since, until: when the exposures were made.
        window: after an exposure, in which its events count.
        known: events count up to then.
    """

    experiment: str
    since: int
    until: int
    window: int
    known: int

    @classmethod
    def of(
        cls,
        experiment: str,
        *,
        since: datetime,
        until: datetime,
        window: timedelta = timedelta(days=1),
        known: datetime | None = None,
    ) -> Span:
        """Return the span between two times; without ``known``, events count up to ``until``.

        Example:
            >>> from datetime import UTC
            >>> begun = datetime.fromtimestamp(3, UTC)
            >>> Span.of("gates", since=begun, until=begun + timedelta(seconds=2), window=timedelta(seconds=1))
            Span(experiment='gates', since=3000000, until=5000000, window=1000000, known=5000000)
        """
        width = window // timedelta(microseconds=1)
        return cls(experiment, micros(since), micros(until), width, micros(known or until))

    def seen(self, table: Any, arms: Sequence[str]) -> sa.ColumnElement[bool]:
        """Say which rows of a table are of some arms and of this span."""
        return sa.and_(
            table.c.experiment == self.experiment,
            table.c.time >= self.since,
            table.c.time < self.until,
            table.c.arm.in_(arms),
        )


@dataclass(frozen=True)
class Totals:
    """An arm's sums.

    Args:
        units, requests, shown: units that saw the arm, their requests, and candidates in those.
        clicks, conversions: candidates that have them.
        ctr, conversion_rate: what the rates rest on, units being the clusters.
    """

    units: int
    requests: int
    shown: int
    clicks: int = 0
    conversions: int = 0
    ctr: Sums = NOTHING
    conversion_rate: Sums = NOTHING


def totals(database: Database, span: Span, arms: Sequence[str]) -> tuple[dict[str, Totals], int]:
    """Sum up what arms showed, and what came of it.

    An event that names its request counts for the last exposure of that request before it; one that names a unit
    and an item, for the last exposure of the unit, of whatever items; in either case if it comes within the window.
    A candidate has each kind of event once, whether it is named by its place or by its item; an item that stands
    there twice is named by its first place. A unit that saw two arms counts in neither.

    Args:
        database: where exposures and events are.
        span: which of them count.
        arms: that served.

    Returns:
        totals by arm, for those that were seen, and the number of units that saw more than one.

    Raises:
        Unavailable: the database can't be read now.
    """
    found: dict[str, Totals] = {}
    mixed = 0
    with database.reading(seconds=QUERY_SECONDS) as connection:
        both = bool(connection.execute(_named_in_both_ways(span)).scalar())
        rows = connection.execute(_query(span, arms, both=both)).all()
    for row in rows:
        if row.arm is None:
            mixed = int(row.units)
        else:
            n, nn = float(row.shown), float(row.nn)
            clicks = Sums(row.units, float(row.clicks), n, float(row.cc), float(row.cn), nn)
            conversions = Sums(row.units, float(row.conversions), n, float(row.vv), float(row.vn), nn)
            counts = {name: int(getattr(row, name)) for name in _COUNTS}
            found[row.arm] = Totals(**counts, ctr=clicks, conversion_rate=conversions)
    return found, mixed


def scored(database: Database, span: Span, arms: Sequence[str]) -> dict[str, Totals]:
    """Count the units, requests and candidates of shadow arms; nothing came of them, for nobody saw them.

    Args:
        database: where exposures are.
        span: which of them count.
        arms: that scored and did not serve.

    Raises:
        Unavailable: the database can't be read now.
    """
    units = (
        sa.select(
            assignments.c.arm, sa.func.count().label("requests"), sa.func.sum(assignments.c.shown).label("shown")
        )
        .where(span.seen(assignments, arms))
        .group_by(assignments.c.unit, assignments.c.arm)
        .subquery("units")
    )
    query = sa.select(
        units.c.arm, sa.func.count(), sa.func.sum(units.c.requests), sa.func.sum(units.c.shown)
    ).group_by(units.c.arm)
    with database.reading(seconds=QUERY_SECONDS) as connection:
        rows = connection.execute(query).all()
    return {arm: Totals(int(units), int(requests), int(shown)) for arm, units, requests, shown in rows}


def _query(span: Span, arms: Sequence[str], *, both: bool) -> sa.Select[Any]:
    """One row an arm; a row of arm NULL for the units that saw several.

    Args:
        span, arms: what counts.
        both: whether events of one kind name candidates by place and by item.
    """
    first, last = sa.func.min(assignments.c.arm), sa.func.max(assignments.c.arm)
    units = (
        sa.select(
            assignments.c.unit,
            sa.case((first == last, first)).label("arm"),
            sa.func.count().label("requests"),
            sa.func.sum(assignments.c.shown).label("shown"),
        )
        .where(span.seen(assignments, arms))
        .group_by(assignments.c.unit)
        .subquery("units")
    )
    counted = _placed(credited(span, arms)) if both else credited(span, arms)
    # Sorted by unit, and each unit's few events once: a set of them all would be a search for each.
    once = counted.c.exposure_id.concat(" ").concat(counted.c.place)
    came = (
        sa.select(
            counted.c.unit,
            *(
                sa.func.count(sa.case((counted.c.type == kind, once)).distinct()).label(f"{kind}s")
                for kind in ("click", "conversion")
            ),
        )
        .group_by(counted.c.unit)
        .subquery("came")
    )
    n = sa.cast(units.c.shown, sa.Double)  # sums of squares leave the whole numbers
    c, v = (sa.cast(sa.func.coalesce(x, 0), sa.Double) for x in (came.c.clicks, came.c.conversions))
    sums = {"nn": n * n, "clicks": c, "cc": c * c, "cn": c * n, "conversions": v, "vv": v * v, "vn": v * n}
    return (
        sa.select(
            units.c.arm,
            sa.func.count().label("units"),
            sa.func.sum(units.c.requests).label("requests"),
            sa.func.sum(units.c.shown).label("shown"),
            *(sa.func.sum(term).label(name) for name, term in sums.items()),
        )
        .select_from(units.outerjoin(came, came.c.unit == units.c.unit))
        .group_by(units.c.arm)
    )


def _named_in_both_ways(span: Span) -> sa.Select[Any]:
    """Ask whether some events of a kind name their candidate by its place, and others by its item."""
    here = events.c.time >= span.since - SKEW // timedelta(microseconds=1), events.c.time < span.known
    places = sa.func.count(events.c.candidate)
    kinds = sa.select(events.c.type).where(*here).group_by(events.c.type)
    return sa.select(kinds.having(places > 0, places < sa.func.count()).exists())


def _placed(counted: sa.Subquery) -> sa.Subquery:
    """Give an event that names an item the place of the item's first candidate, where others name places.

    Requests are read for events of such exposures only.
    """
    named = sa.func.max(counted.c.candidate).over(partition_by=[counted.c.exposure_id, counted.c.type])
    beside = sa.select(counted, named.label("named")).subquery("beside")
    request = sa.select(exposures.c.content).where(exposures.c.exposure_id == beside.c.exposure_id)
    found = sa.cast(_PlaceOf(request.scalar_subquery(), beside.c.item), sa.String)
    by_item = sa.and_(beside.c.candidate.is_(None), beside.c.named.is_not(None))
    place = sa.case((by_item, sa.func.coalesce(found, beside.c.place)), else_=beside.c.place)
    return sa.select(beside.c.unit, beside.c.type, beside.c.exposure_id, place.label("place")).subquery("placed")


class _PlaceOf(FunctionElement[int]):
    """The place of the first candidate with an item, by an exposure's content; NULL if there is none."""

    type = sa.Integer()
    inherit_cache = True


@compiles(_PlaceOf, "sqlite")
def _(element: _PlaceOf, compiler: SQLCompiler, **how: Any) -> str:
    content, item = (compiler.process(one, **how) for one in element.clauses)
    return f"(SELECT min(key) FROM json_each({content}, '$.items') WHERE value = {item})"


@compiles(_PlaceOf, "postgresql")
def _(element: _PlaceOf, compiler: SQLCompiler, **how: Any) -> str:
    content, item = (compiler.process(one, **how) for one in element.clauses)
    # Its json reads every text, and has none with NUL; one that differs elsewhere does no harm.
    whole = rf"CAST(replace({content}, '\u0000', '\u0001') AS json)"
    items = f"CAST({whole} ->> 'items' AS json)"
    each = f"json_array_elements_text({items}) WITH ORDINALITY AS one(item, number)"
    return f"(SELECT min(one.number) - 1 FROM {each} WHERE one.item = {item})"


def credited(
    span: Span, arms: Sequence[str], *, requests: sa.Select[Any] | None = None, units: sa.Select[Any] | None = None
) -> sa.Subquery:
    """Select the unit, exposure and place that each event counts for: a candidate's number, or ``item`` and id.

    Of two events of one place there are two rows.

    Args:
        span, arms: what counts.
        requests, units: of the events that are asked for; None: all.
    """
    ways = []
    for by_request, among in ((True, requests), (False, units)):
        query = _credited(span, arms, by_request=by_request)
        if among is not None:
            # Within a function it stays a set that is made once. PostgreSQL would make a join of it, and without
            # statistics, as of a table that was just filled, a loop in a loop.
            named = events.c.request_id if by_request else events.c.unit
            query = query.where(sa.func.coalesce(named.in_(among), sa.false()))
        ways.append(query)
    return sa.union_all(*ways).subquery("credited")


def _credited(span: Span, arms: Sequence[str], *, by_request: bool) -> sa.Select[Any]:
    touched, other = assignments.alias(), assignments.alias()
    skew = SKEW // timedelta(microseconds=1) if by_request else 0

    def meets(exposure: Any) -> sa.ColumnElement[bool]:
        pair = "request_id" if by_request else "unit"
        return exposure.c[pair] == events.c[pair]

    # Seeks the last exposure before the event: a request id that somebody uses again and again costs no more.
    last = (
        sa.select(sa.func.max(other.c.time))
        .where(meets(other), span.seen(other, arms), other.c.time <= events.c.time + skew)
        .correlate(events)
        .scalar_subquery()
    )
    item = sa.literal("item ").concat(events.c.item)
    counts = sa.and_(
        meets(touched),
        (touched.c.experiment.concat("") if by_request else touched.c.experiment) == span.experiment,
        touched.c.arm.in_(arms),
        touched.c.time == last,
        events.c.time <= touched.c.time + span.window,
        sa.or_(events.c.candidate.is_(None), events.c.candidate < touched.c.shown),
    )
    # SQLite keeps no statistics. The outer join lets it start with the events (those that count for nothing have no
    # unit), and a text that no index holds keeps it from reading the whole experiment for each request.
    return (
        sa.select(
            events.c.type,
            touched.c.unit,
            touched.c.exposure_id,
            events.c.candidate,
            events.c.item,
            sa.func.coalesce(sa.cast(events.c.candidate, sa.String), item).label("place"),
        )
        .join_from(events, touched, counts, isouter=True)
        .where(
            events.c.type.in_(["click", "conversion"]),
            events.c.time >= span.since - skew,
            events.c.time < span.known,
            events.c.request_id.is_not(None) if by_request else events.c.request_id.is_(None),
        )
    )


def micros(moment: datetime) -> int:
    """Return a time as the tables have it."""
    return round(moment.timestamp() * 1e6)
