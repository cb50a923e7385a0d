"""Behaviour histories made from the log itself: what a user did strictly before each row."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl

from ctr_models.batch import Ragged
from pipelines.features.canonical import canonical_series, type_of
from pipelines.features.encoders import user_ids
from pipelines.features.spec import LABEL, Column, FeatureSpec
from pipelines.features.stage import TIME, Staged
from pipelines.features.validate import time_key


@dataclass(frozen=True)
class Histories:
    """For each of N rows, a stretch of one array of events.

    Args:
        events: rows of the log that are events, (E,) int64, by user, then time.
        starts: (N,) int64.
        lengths: (N,) int64.
    """

    events: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray

    @classmethod
    def of(cls, user: np.ndarray, time: np.ndarray, event: np.ndarray, max_length: int) -> Histories:
        """Find each row's history: the last events of its user with a smaller time.

        Rows of one user with equal times do not see each other. Events of equal time stand in the order of
        their rows.

        Args:
            user: (N,) int64; 0 is nobody, who has no history.
            time: (N,) any ordered number.
            event: (N,) bool, whether the row is an event that later rows see.
            max_length: how many are kept.

        Example:
            >>> user, time = np.array([7, 7, 7, 8]), np.array([1, 2, 2, 3])
            >>> h = Histories.of(user, time, np.array([True, True, True, True]), 5)
            >>> h.lengths.tolist(), h.events[h.starts[1] : h.starts[1] + 1].tolist()
            ([0, 1, 1, 0], [0])
        """
        order = np.lexsort((time, user))  # stable, so equal times stay in the order of rows
        user, time, event = user[order], time[order], event[order] & (user[order] != 0)
        n = len(order)
        before = np.cumsum(event) - event  # (N,) events that stand earlier in this order
        new_user = np.ones(n, dtype=bool)
        new_user[1:] = user[1:] != user[:-1]
        new_time = new_user.copy()
        new_time[1:] |= time[1:] != time[:-1]
        at = np.arange(n)
        first_of_user = np.maximum.accumulate(np.where(new_user, at, 0))
        first_of_time = np.maximum.accumulate(np.where(new_time, at, 0))
        ends = before[first_of_time] if n else before
        begins = np.maximum(before[first_of_user], ends - max_length) if n else before
        lengths = np.where(user != 0, ends - begins, 0)
        starts = np.empty(n, dtype=np.int64)
        counts = np.empty(n, dtype=np.int64)
        starts[order], counts[order] = begins, lengths
        return cls(order[event], starts, counts)

    @classmethod
    def at(
        cls,
        user: np.ndarray,
        time: np.ndarray,
        event: np.ndarray,
        max_length: int,
        *,
        asked: np.ndarray,
        moment: float,
    ) -> Histories:
        """Find the histories that rows of some users would have at a moment.

        Args:
            user: as in :meth:`of`.
            time: likewise.
            event: likewise.
            max_length: likewise.
            asked: users, (M,) int64.
            moment: a time; events of this very time are not seen.

        Returns:
            One history for each that was asked for.

        Example:
            >>> user, time = np.array([7, 7, 8]), np.array([1, 2, 2])
            >>> h = Histories.at(user, time, np.array([True, True, True]), 5, asked=np.array([8, 7]), moment=2)
            >>> h.lengths.tolist()
            [0, 1]
        """
        n = len(user)
        moments = np.full(len(asked), moment, dtype=time.dtype)
        nothing = np.zeros(len(asked), dtype=bool)
        every = cls.of(
            np.concatenate([user, asked]),
            np.concatenate([time, moments]),
            np.concatenate([event, nothing]),
            max_length,
        )
        return cls(every.events, every.starts[n:], every.lengths[n:])

    def take(self, ids: np.ndarray, rows: slice | np.ndarray) -> Ragged:
        """Return the histories of some rows.

        Args:
            ids: of the events, (E,) int32.
            rows: which rows.
        """
        starts, lengths = self.starts[rows], self.lengths[rows]
        offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
        np.cumsum(lengths, out=offsets[1:])
        source = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)
        return Ragged(ids[source], offsets)


def log_histories(
    staged: Staged,
    column: Column,
    users: np.ndarray,
    known: np.ndarray,
    *,
    asked: np.ndarray | None = None,
    moment: float = 0,
) -> Histories:
    """Find the histories that a ``from_log`` sequence is made of in a staged log.

    Args:
        staged: with times.
        column: the sequence.
        users: of the rows, (N,) int64; 0 is nobody.
        known: whether the row has a value to remember, (N,) bool.
        asked: the users whose histories at ``moment`` are wanted; None: those of the rows themselves.
        moment: a time, as the log's are numbered.
    """
    assert column.from_log is not None
    event = known
    if column.from_log.label is not None:
        event = event & (staged.numbers(LABEL) == column.from_log.label)
    time = staged.numbers(TIME)
    if asked is None:
        return Histories.of(users, time, event, column.max_length)
    return Histories.at(users, time, event, column.max_length, asked=asked, moment=moment)


def add_histories(spec: FeatureSpec, log: pl.DataFrame, *, source: str = "log") -> pl.DataFrame:
    """Add each ``from_log`` sequence as a list column of raw values under its name, oldest first.

    A row then says all that a scoring request says.

    Args:
        spec: the definition.
        log: raw rows, with label, user and time.
        source: the file that messages name.

    Raises:
        DataError: a time is missing or can't be parsed.

    Example:
        >>> spec = FeatureSpec.model_validate({"label": "click", "user": "u", "timestamp": "t", "columns": [
        ...     {"name": "ad", "kind": "categorical"},
        ...     {"name": "seen", "kind": "sequence", "table": "ad", "from_log": {"column": "ad"}}]})
        >>> log = pl.DataFrame({"click": [1, 1, 0], "u": ["x"] * 3, "t": [1, 2, 3], "ad": ["a", "b", "c"]})
        >>> add_histories(spec, log)["seen"].to_list()
        [[], ['a'], ['a', 'b']]
    """
    made = [c for c in spec.columns if c.from_log is not None]
    if not made:
        return log
    assert spec.user is not None
    assert spec.timestamp is not None
    user = user_ids(canonical_series(log[spec.user], type_of(log[spec.user].dtype) or "text"))
    time = time_key(log[spec.timestamp], source)
    out = []
    for c in made:
        values = log[c.column]
        canonical = canonical_series(values, type_of(values.dtype) or "text")
        event = canonical.is_not_null().to_numpy()
        if c.from_log is not None and c.from_log.label is not None:
            event = event & (log[spec.label].cast(pl.Float64) == c.from_log.label).fill_null(False).to_numpy()
        histories = Histories.of(user, time, event, c.max_length)
        places = histories.take(histories.events, slice(None))
        rows = np.repeat(np.arange(len(log)), np.diff(places.offsets))
        flat = pl.DataFrame({"row": rows, "value": values[places.values]})
        lists = flat.group_by("row", maintain_order=True).agg("value")
        joined = pl.DataFrame({"row": np.arange(len(log))}).join(lists, on="row", how="left", maintain_order="left")
        empty = pl.lit([], dtype=pl.List(values.dtype))
        out.append(joined.select(pl.col("value").fill_null(empty).alias(c.name)).to_series())
    return log.with_columns(out)
