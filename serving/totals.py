"""What came of an experiment's exposures, summed by unit and arm inside the database."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa

from pipelines.experiments.rates import Sums
from serving.database import Database, assignments, events

SKEW = timedelta(minutes=5)
"""How far a client's clock may be behind: its events then seem to come before what they follow."""
QUERY_SECONDS = 600.0
_COUNTS = ("units", "requests", "shown", "clicks", "conversions")


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
    clicks: int
    conversions: int
    ctr: Sums
    conversion_rate: Sums


def totals(
    database: Database,
    experiment: str,
    arms: Sequence[str],
    *,
    since: datetime,
    until: datetime,
    window: timedelta = timedelta(days=1),
    apart: bool = False,
) -> tuple[dict[str, Totals], int]:
    """Sum up what the arms showed in a span of time, and what came of it.

    An event that names its request counts for the last exposure of that request before it; one that names a unit
    and an item, for the last exposure of the unit, of whatever items; in either case if it comes within the window.
    A candidate has each kind of event once. A unit that saw two arms counts in neither.

    Args:
        database: where exposures and events are.
        experiment: its name.
        arms: whose exposures count.
        since, until: when they were made; events count up to ``until``.
        window: after an exposure, in which its events count.
        apart: a unit counts in each arm that it saw, as with shadow arms, of which it sees all.

    Returns:
        totals by arm, for those that were seen, and the number of units that saw more than one.

    Raises:
        Unavailable: the database can't be read now.
    """
    found: dict[str, Totals] = {}
    mixed = 0
    width = window // timedelta(microseconds=1)
    rows: list[Any] = []
    with database.reading(seconds=QUERY_SECONDS) as connection:
        for group in [[arm] for arm in arms] if apart else [list(arms)]:
            rows += connection.execute(_query(experiment, group, micros(since), micros(until), width)).all()
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


def _query(experiment: str, arms: list[str], since: int, until: int, window: int) -> sa.Select[Any]:
    """One row an arm; a row of arm NULL for the units that saw several."""
    first, last = sa.func.min(assignments.c.arm), sa.func.max(assignments.c.arm)
    units = (
        sa.select(
            assignments.c.unit,
            sa.case((first == last, first)).label("arm"),
            sa.func.count().label("requests"),
            sa.func.sum(assignments.c.shown).label("shown"),
        )
        .where(seen(assignments, experiment, arms, since, until))
        .group_by(assignments.c.unit)
        .subquery("units")
    )
    counted = sa.union(
        credited(experiment, arms, since, until, window, by_request=True),
        credited(experiment, arms, since, until, window, by_request=False),
    ).subquery("counted")
    came = (
        sa.select(
            counted.c.unit,
            sa.func.sum(sa.case((counted.c.type == "click", 1), else_=0)).label("clicks"),
            sa.func.sum(sa.case((counted.c.type == "conversion", 1), else_=0)).label("conversions"),
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


def credited(
    experiment: str, arms: list[str], since: int, until: int, window: int, *, by_request: bool
) -> sa.Select[Any]:
    """Select the unit, exposure and place that each event counts for: a candidate's number, or ``item`` and id."""
    touched, other = assignments.alias(), assignments.alias()
    skew = SKEW // timedelta(microseconds=1) if by_request else 0

    def meets(exposure: Any) -> sa.ColumnElement[bool]:
        pair = "request_id" if by_request else "unit"
        return exposure.c[pair] == events.c[pair]

    # Seeks the last exposure before the event: a request id that somebody uses again and again costs no more.
    last = (
        sa.select(sa.func.max(other.c.time))
        .where(meets(other), seen(other, experiment, arms, since, until), other.c.time <= events.c.time + skew)
        .correlate(events)
        .scalar_subquery()
    )
    item = sa.literal("item ").concat(events.c.item)
    counts = sa.and_(
        meets(touched),
        (touched.c.experiment.concat("") if by_request else touched.c.experiment) == experiment,
        touched.c.arm.in_(arms),
        touched.c.time == last,
        events.c.time <= touched.c.time + window,
        sa.or_(events.c.candidate.is_(None), events.c.candidate < touched.c.shown),
    )
    # SQLite keeps no statistics. The outer join lets it start with the events (those that count for nothing have no
    # unit), and a text that no index holds keeps it from reading the whole experiment for each request.
    return (
        sa.select(
            events.c.type,
            touched.c.unit,
            touched.c.exposure_id,
            sa.func.coalesce(sa.cast(events.c.candidate, sa.String), item).label("place"),
        )
        .join_from(events, touched, counts, isouter=True)
        .where(
            events.c.type.in_(["click", "conversion"]),
            events.c.time >= since - skew,
            events.c.time < until,
            events.c.request_id.is_not(None) if by_request else events.c.request_id.is_(None),
        )
    )


def seen(table: Any, experiment: str, arms: list[str], since: int, until: int) -> sa.ColumnElement[bool]:
    """Say which rows of a table are of some arms and of a span of time."""
    return sa.and_(
        table.c.experiment == experiment, table.c.time >= since, table.c.time < until, table.c.arm.in_(arms)
    )


def micros(moment: datetime) -> int:
    """Return a time as the tables have it."""
    return round(moment.timestamp() * 1e6)
