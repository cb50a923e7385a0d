"""What an arm's own ranking would be clicked, estimated from the requests that were answered in random order.

Of a request in uniformly random order, each of the N candidates stands where the ranking of arm a would put it with
chance 1 / N. Those that do, its matches, stand for what the ranking would have shown, each with weight N:

    rate = sum_i w_i click_i / sum_i w_i        over the matches i, w_i = N of their request

It is the self-normalised inverse-propensity estimate, a ratio of sums by unit as every live rate. The arm need not
have served: a shadow arm scores the same candidates, so that its order, which nobody saw, has a click rate too. A
click is taken to depend on the candidate and its position, whatever stands around it.

Sources: item-position click model, Li et al. 2018 (arXiv 1804.10488); self-normalised weights, Joachims et al. 2016
(arXiv 1608.04468).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import sqlalchemy as sa

from pipelines.experiments.rates import Sums
from serving.database import MATCHES, Database, Row, assignments, matches
from serving.router import ranks
from serving.totals import QUERY_SECONDS, Span, credited

_SUMS = "x", "n", "xx", "xn", "nn"


def matched(
    rows: Sequence[Row], scores: np.ndarray, positions: np.ndarray, items: Sequence[str | None]
) -> list[Row]:
    """Return a row for each candidate that a random order put where an arm's scores would.

    Args:
        rows: of the exposure's assignments, by :func:`serving.events.assigned`.
        scores: of the arm, (N,).
        positions: drawn at random, (N,).
        items: what events may call the candidates, (N,).

    Example:
        >>> exposed = {"experiment": "gates", "arm": "gated", "unit": "7", "time": 0, "exposure_id": "x1"}
        >>> rows = matched([("sluice_assignments", exposed)], np.array([0.1, 0.9, 0.5]), np.array([2, 1, 0]), "abc")
        >>> [(row["candidate"], row["item"], row["shown"]) for _, row in rows]
        [(0, 'a', 3)]
    """
    hits = np.flatnonzero(positions == ranks(scores)).tolist()
    names = "experiment", "arm", "unit", "time", "exposure_id"
    return [
        (MATCHES, {**{n: row[n] for n in names}, "candidate": i, "item": items[i], "shown": len(scores)})
        for _, row in rows
        for i in hits
    ]


@dataclass(frozen=True)
class Ranking:
    """What an arm's own ranking would bring.

    Args:
        requests: in random order, with a match.
        ctr: weighted clicks and weights of the matches, units being the clusters.
    """

    requests: int
    ctr: Sums


def ranked(database: Database, span: Span, arms: Sequence[str]) -> dict[str, Ranking]:
    """Sum up weights and weighted clicks of what matches the arms' rankings; a unit of two arms counts in neither.

    Args:
        database: where exposures and events are.
        span: which of them count.
        arms: that served, or one that did not.

    Returns:
        sums by arm, for those with a match.

    Raises:
        Unavailable: the database can't be read now.
    """
    with database.reading(seconds=QUERY_SECONDS) as connection:
        if connection.execute(sa.select(1).where(span.seen(matches, arms)).limit(1)).first() is None:
            return {}  # nothing was drawn at random: the events need not be read
        rows = connection.execute(_query(span, arms)).all()
    return {
        row.arm: Ranking(int(row.requests), Sums(row.units, *(float(getattr(row, name)) for name in _SUMS)))
        for row in rows
    }


def _query(span: Span, arms: Sequence[str]) -> sa.Select[Any]:
    """One row an arm."""
    clicked = _clicked(span, arms)
    place = sa.cast(matches.c.candidate, sa.String)
    hit = sa.and_(
        clicked.c.exposure_id == matches.c.exposure_id,
        sa.or_(clicked.c.place == place, clicked.c.place == sa.literal("item ").concat(matches.c.item)),
    )
    # A candidate may be named by its place and by its item: it was clicked once.
    one = (
        sa.select(
            matches.c.unit,
            matches.c.arm,
            matches.c.exposure_id,
            matches.c.shown,
            sa.func.max(sa.case((clicked.c.place.is_not(None), matches.c.shown), else_=0)).label("worth"),
        )
        .join_from(matches, clicked, hit, isouter=True)
        .where(span.seen(matches, arms))
        .group_by(matches.c.exposure_id, matches.c.candidate, matches.c.unit, matches.c.arm, matches.c.shown)
        .subquery("one")
    )
    other = assignments.alias()
    elsewhere = sa.exists().where(span.seen(other, arms), other.c.unit == one.c.unit, other.c.arm != one.c.arm)
    units = (
        sa.select(
            one.c.arm,
            sa.func.count(one.c.exposure_id.distinct()).label("requests"),
            sa.cast(sa.func.sum(one.c.worth), sa.Double).label("x"),
            sa.cast(sa.func.sum(one.c.shown), sa.Double).label("n"),
        )
        .where(~elsewhere)
        .group_by(one.c.unit, one.c.arm)
        .subquery("units")
    )
    x, n = units.c.x, units.c.n
    sums = {"x": x, "n": n, "xx": x * x, "xn": x * n, "nn": n * n}
    return sa.select(
        units.c.arm,
        sa.func.count().label("units"),
        sa.func.sum(units.c.requests).label("requests"),
        *(sa.func.sum(term).label(name) for name, term in sums.items()),
    ).group_by(units.c.arm)


def _clicked(span: Span, arms: Sequence[str]) -> sa.Subquery:
    """Exposures and places. Few requests are answered in random order: events of others need not be looked up."""
    same = [matches.c[name] == assignments.c[name] for name in ("experiment", "unit", "time", "exposure_id")]
    request = sa.select(assignments.c.request_id).where(*same).correlate(matches).scalar_subquery()
    requests, units = (sa.select(one).where(span.seen(matches, arms)) for one in (request, matches.c.unit))
    came = credited(span, arms, requests=requests, units=units)
    return sa.select(came.c.exposure_id, came.c.place).where(came.c.type == "click").distinct().subquery("clicked")
