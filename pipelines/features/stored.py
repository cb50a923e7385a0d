"""What an online feature store holds of users and items, and how each is found: for writers and for readers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import polars as pl
import pyarrow as pa
from pydantic import BaseModel, ConfigDict

from pipelines.features.canonical import Type, canonical, canonical_series
from pipelines.features.columns import Coded, RawColumn
from pipelines.features.hashing import stable_hash
from pipelines.features.sequences import Histories
from pipelines.features.spec import Column, FeatureSpec

FORMAT = 1
KEY, HASH = "__key__", "__hash__"
"""Columns of an entity's rows: its id as text, and the stable hash of that text."""
PIECE = 65_536
"""Users or items that are written at a time."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class History(_Strict):
    """How a stored history was made."""

    column: str
    rows: Literal["clicks", "skips", "all"]
    max_length: int


class Entity(_Strict):
    """Users, or items: what is stored of each.

    Args:
        key: the raw column of the id.
        type: canonical type of the ids.
        columns: raw columns of a request, histories included, in the order of the stored values.
    """

    key: str
    type: Type
    columns: tuple[str, ...]

    def id(self, value: Any) -> str | None:
        """Return an id as it is stored; None where it is missing, or can't be one.

        Example:
            >>> user = Entity(key="user_id", type="integer", columns=())
            >>> user.id(5), user.id("5"), user.id(None), user.id("five")
            ('5', '5', None, None)
        """
        try:
            form = canonical(value, self.type)
        except ValueError:  # the encoder refuses it, by its path
            return None
        return None if form is None else _text(form)

    def ids(self, values: pl.Series) -> pl.Series:
        """Return the ids of a raw column as they are stored; null where missing."""
        forms = canonical_series(values, self.type)
        if self.type == "float":
            return pl.Series(KEY, [None if v is None else _text(v) for v in forms.to_list()], dtype=pl.String)
        return forms.cast(pl.String).rename(KEY)


class Stored(_Strict):
    """Everything that a store holds, and what a FeatureSpec must say for it to fit.

    Args:
        user: None if the log tells no users apart.
        item: likewise.
        histories: of users, by name.
    """

    user: Entity | None
    item: Entity | None
    histories: dict[str, History]

    @classmethod
    def of(cls, spec: FeatureSpec, types: Mapping[str, Type]) -> Stored:
        """Say what a definition needs: columns of role ``user`` and ``item``, and histories made from the log.

        A column that features of both roles read is the item's.

        Args:
            spec: the definition.
            types: canonical types of the columns of the ids.

        Example:
            >>> spec = FeatureSpec.model_validate({"label": "click", "user": "u", "item": "ad", "columns": [
            ...     {"name": "city", "kind": "categorical", "role": "user"},
            ...     {"name": "ad", "kind": "categorical", "role": "item"},
            ...     {"name": "price", "kind": "numeric", "role": "item"}]})
            >>> stored = Stored.of(spec, {"u": "integer", "ad": "text"})
            >>> stored.user.columns, stored.item.columns
            (('city',), ('price',))
        """
        made = {c.name: _history(c) for c in spec.columns if c.from_log is not None}
        plain = [c for c in spec.direct if c.from_log is None]
        of_items = {c.column: None for c in plain if c.role == "item" and c.column != spec.item}
        of_users = {c.column: None for c in plain if c.role == "user" and c.column not in (spec.user, *of_items)}
        user = item = None
        if spec.user is not None:
            user = Entity(key=spec.user, type=types[spec.user], columns=(*of_users, *made))
        if spec.item is not None:
            item = Entity(key=spec.item, type=types[spec.item], columns=tuple(of_items))
        return cls(user=user, item=item, histories=made)

    def lacks(self, spec: FeatureSpec) -> list[str]:
        """Say what a definition needs and the store does not hold as it needs it.

        Example:
            >>> spec = FeatureSpec.model_validate({"label": "click", "item": "ad", "columns": [
            ...     {"name": "price", "kind": "numeric", "role": "item"}]})
            >>> Stored(user=None, item=Entity(key="ad", type="text", columns=()), histories={}).lacks(spec)
            ["no column 'price' of items"]
        """
        columns = {name: "text" for name in (spec.user, spec.item) if name is not None}
        wanted = Stored.of(spec, columns)  # type: ignore[arg-type]
        out: list[str] = []
        for name, ours, theirs in (("users", self.user, wanted.user), ("items", self.item, wanted.item)):
            if theirs is None or not theirs.columns:
                continue
            if ours is None or ours.key != theirs.key:
                found = "are not stored" if ours is None else f"are stored by {ours.key!r}"
                out.append(f"{name} {found}, the model knows them by {theirs.key!r}")
                continue
            out += [f"no column {c!r} of {name}" for c in theirs.columns if c not in ours.columns]
        for name, history in wanted.histories.items():
            held = self.histories.get(name)
            if held is None:
                continue  # told above
            if (held.column, held.rows) != (history.column, history.rows):
                out.append(f"history {name!r} is made of other rows than the model's")
            elif held.max_length < history.max_length:
                out.append(f"history {name!r} holds {held.max_length} events, the model reads {history.max_length}")
        return out


@dataclass(frozen=True)
class Rows:
    """The users, or the items, that a log knows at a moment.

    Args:
        frame: their hashes and keys, sorted by hash, and their latest columns.
        histories: one history a row, and the column of the log that its events are of, by name.
    """

    frame: pl.DataFrame
    histories: Mapping[str, tuple[Histories, RawColumn]]

    def __len__(self) -> int:
        return len(self.frame)

    def pieces(self, size: int = PIECE) -> Iterator[pl.DataFrame]:
        """Yield the rows with their histories as lists, oldest first, in one piece at least.

        Rows of equal hashes stay together.
        """
        hashes = self.frame[HASH].to_numpy()
        start = stop = 0
        while start < len(self) or not stop:
            stop = min(start + size, len(self))
            stop += int(np.searchsorted(hashes[stop:], hashes[stop - 1 : stop], side="right").sum())
            rows = slice(start, stop)
            lists = [self._lists(name, *self.histories[name], rows) for name in self.histories]
            yield self.frame[start:stop].with_columns(lists)
            if not stop:
                return
            start = stop

    @staticmethod
    def _lists(name: str, histories: Histories, raw: RawColumn, rows: slice) -> pl.Series:
        places = histories.take(histories.events, rows)
        values = gather(raw, places.values).to_arrow()
        return pl.Series(name, pa.LargeListArray.from_arrays(pa.array(places.offsets), values))


@dataclass(frozen=True)
class Features:
    """What is known at a moment, ready to be written to a store.

    Args:
        stored: which columns there are.
        users: None if the log tells no users apart.
        items: likewise.
        at: the moment, as it was given; None: after the last row of the log.
        fingerprint: of the log.
    """

    stored: Stored
    users: Rows | None
    items: Rows | None
    at: str | None
    fingerprint: str


def key_hash(ids: Sequence[str] | pl.Series) -> np.ndarray:
    """Return the hash of each id, (N,) uint64, by which stored rows are sorted."""
    series = ids if isinstance(ids, pl.Series) else pl.Series(list(ids), dtype=pl.String)
    return stable_hash(series)


def _history(column: Column) -> History:
    assert column.from_log is not None
    source = column.from_log
    return History(column=source.column, rows=source.rows, max_length=column.max_length)


def _text(form: str | int | float) -> str:
    return repr(form) if isinstance(form, float) else str(form)


def gather(raw: RawColumn, rows: np.ndarray) -> pl.Series:
    """Return some rows of a column."""
    if not isinstance(raw, Coded):
        return raw[rows].fill_nan(None) if raw.dtype.is_float() else raw[rows]
    places = pl.Series(raw.index[rows].astype(np.int64))
    return raw.values.gather(places.set(places < 0, None)).rechunk()
