"""Encoding one request: the same ids and numbers as the nightly batch, in microseconds a column."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate, chain
from itertools import repeat as again
from operator import itemgetter
from types import NoneType
from typing import Any, TypeAlias

import numpy as np
import polars as pl

from ctr_models.batch import EncodedRows, Ragged
from ctr_models.candidates import Candidates
from ctr_models.errors import RequestError, nearest
from ctr_models.schema import Schema
from pipelines.features.candidate_columns import CandidateColumns
from pipelines.features.canonical import DTYPES, MAX_TEXT, Type, canonical, canonical_series
from pipelines.features.crosses import Hashed, cross_keys, part_type
from pipelines.features.encoders import MISSING, UNKNOWN, standardise, user_ids
from pipelines.features.overlay import overlaid
from pipelines.features.spec import Column, Standard, Vocabulary
from pipelines.features.state import FeatureState, Table
from pipelines.features.transform import repeat, take

MAX_VALUES = 100_000
"""Elements of the longest list that a request may hold."""

EXACT = 2**53
"""Integers below this are floats without loss."""

_UNSEEN = -1
_NUMBERS = {float, int, NoneType}
_PLAIN = {str, int, float, bool, NoneType}
_PYTHON: dict[Type, type] = {"integer": int, "float": float, "text": str}


class OnlineEncoder:
    """Encodes requests by a FeatureState.

    The raw row of a candidate is ``{**user, **context, **candidate}``, in which null gives nothing; a column that
    none of them gives is missing. A history made from the log is given as a list under its name, oldest first. A
    column that no candidate gives is encoded once, and repeated where rows are asked for.

    Args:
        state: fitted.

    Example:
        >>> from pipelines.features.spec import FeatureSpec
        >>> spec = FeatureSpec.model_validate({"label": "click", "columns": [
        ...     {"name": "ad", "kind": "categorical"}, {"name": "price", "kind": "numeric"}]})
        >>> log = pl.LazyFrame({"click": [0, 1], "ad": ["a", "b"], "price": [1.0, 3.0]})
        >>> encoder = OnlineEncoder(FeatureState.fit(spec, log, source="log"))
        >>> rows = encoder.encode({}, {"price": 3}, [{"ad": "b"}, {"ad": "new"}])
        >>> rows.single.tolist(), rows.dense.ravel().tolist()
        ([[3, 1]], [1.0, 1.0])
    """

    def __init__(self, state: FeatureState) -> None:
        self.state, self._schema = state, state.schema()
        spec = state.spec
        by_name = {c.name: c for c in spec.columns}
        tables = {name: _Ids(table) for name, table in state.tables.items()}
        self._encoders: list[tuple[str, _Field | _Cross]] = []
        parts = {name: by_name[name] for c in spec.crosses for name in c.of}
        crossed = {name: _Part(c.column, part_type(spec, c, state.types)) for name, c in parts.items()}
        for f in self._schema.fields:
            c = by_name[f.name]
            if c.kind == "cross":
                self._encoders.append((f.name, _Cross(tables[c.name], [crossed[name] for name in c.of])))
            else:
                self._encoders.append((f.name, _Field(c, state, tables.get(c.table or c.name))))
        # What a log holds besides the features does no harm in a request, labels apart.
        given = (spec.user, spec.item, spec.timestamp, *spec.keep)
        labels = spec.labels.values()
        self._allowed = frozenset((*spec.request_columns, *(n for n in given if n and n not in labels)))
        self._unread = self._allowed.difference(spec.request_columns)
        self._items = [f.name for f in self._schema.fields if self._of_items(by_name, f.name)]
        # Of a client, all requests share the same fields.
        self._parts = lru_cache(maxsize=64)(self._split)

    def encode(
        self,
        user: Mapping[str, Any],
        context: Mapping[str, Any],
        candidates: Sequence[Mapping[str, Any]],
    ) -> EncodedRows:
        """Encode the candidates of one request.

        Args:
            user: raw values that hold for every candidate.
            context: likewise; wins over the user's.
            candidates: raw values of each; win over both.

        Returns:
            One row a candidate; labels are 0.

        Raises:
            RequestError: a name that no feature has, or a value that is not of its column's type; ``where`` is
                its path, such as ``candidates.3.price``.
        """
        request = _Request(user, context, candidates, self._allowed)
        size = len(candidates)
        columns = {
            name: _spread(one, size) if same else one for name, (one, same) in self._encoded(request).items()
        }
        return _rows(self._schema, columns, self._users(request, size))

    def candidates(
        self,
        user: Mapping[str, Any],
        context: Mapping[str, Any],
        candidates: Sequence[Mapping[str, Any]],
    ) -> Candidates:
        """Encode the candidates of one request, keeping apart what they share.

        Args:
            user: as in :meth:`encode`, which says also what is raised.
            context: likewise.
            candidates: likewise.

        Returns:
            One user, with the columns that no candidate gives, and a row a candidate of all others.
        """
        return Candidates.of(*self.parts(user, context, candidates, groups=True))

    def parts(
        self,
        user: Mapping[str, Any],
        context: Mapping[str, Any],
        candidates: Sequence[Mapping[str, Any]],
        *,
        groups: bool = False,
    ) -> tuple[EncodedRows, EncodedRows]:
        """Encode as :meth:`candidates` does, and return the row of the user and those of the candidates.

        Each has a part of the schema. Requests whose parts agree make one :class:`ctr_models.Candidates` together.
        So fields of items stand with the candidates even when none of them gives a value.
        Whose rows they are is told only with ``groups``: a score does not depend on it.
        """
        request = _Request(user, context, candidates, self._allowed)
        columns, size = self._encoded(request), len(candidates)
        for name in self._items:
            one, same = columns[name]
            if same:
                columns[name] = _spread(one, size), False
        shared, own = self._parts(frozenset(name for name, (_, same) in columns.items() if same))
        encoded = {name: one for name, (one, _) in columns.items()}
        users = self._users(request, size) if groups else np.zeros(size, dtype=np.int64)
        return _rows(shared, encoded, np.zeros(1, dtype=np.int64)), _rows(own, encoded, users)

    def _encoded(self, request: _Request) -> dict[str, tuple[_Values, bool]]:
        """Encode each field: a value a candidate, or one that serves all, and True."""
        for name in self._unread:
            if request.gives(name):
                request.check_plain(name)
        columns: dict[str, tuple[_Values, bool]] = {}
        for name, one in self._encoders:
            if isinstance(one, _Cross):
                columns[name] = one.encode(request)
            else:
                values, same = request.values(one.key)
                columns[name] = one.encode(values, request, same), same
        return columns

    @staticmethod
    def _of_items(columns: Mapping[str, Column], name: str) -> bool:
        c = columns[name]
        return any(columns[part].role == "item" for part in (c.of if c.kind == "cross" else (name,)))

    def _split(self, shared: frozenset[str]) -> tuple[Schema, Schema]:
        names = {f.name for f in self._schema.fields}
        return self._schema.only(set(shared)), self._schema.only(names - shared)

    def _users(self, request: _Request, size: int) -> np.ndarray:
        name = self.state.spec.user
        if name is None or not request.gives(name):
            return np.zeros(size, dtype=np.int64)
        kind = self.state.types[name]
        values, same = request.values(name)
        forms = [request.canonical(v, kind, name, i, same) for i, v in enumerate(values)]
        groups = user_ids(pl.Series(forms, dtype=DTYPES[kind]))
        return np.repeat(groups, size) if same else groups


_Values: TypeAlias = np.ndarray | Ragged | int
"""An encoded column; of what all candidates share the id alone, where there is but one."""


def _spread(one: _Values, size: int) -> _Values:
    """Return what all candidates share, once a candidate; an id spreads by itself."""
    return one if isinstance(one, int) else repeat(one, size)


def _rows(schema: Schema, columns: Mapping[str, _Values], group: np.ndarray) -> EncodedRows:
    """Put the encoded columns of a schema side by side; labels are 0."""
    size = len(group)
    dense = np.empty((size, len(schema.dense)), dtype=np.float32)
    for i, f in enumerate(schema.dense):
        dense[:, i] = columns[f.name]  # type: ignore[assignment]
    categories = [f.name for f in schema.sparse if f.kind == "categorical"]
    single = np.empty((len(categories), size), dtype=np.int32)
    for i, name in enumerate(categories):
        single[i] = columns[name]  # type: ignore[assignment]
    ragged = {f.name: columns[f.name] for f in (*schema.sparse, *schema.sequences) if f.kind != "categorical"}
    return EncodedRows(
        schema=schema,
        dense=dense,
        single=single,
        ragged=ragged,  # type: ignore[arg-type]
        label=np.zeros(size, dtype=np.float32),
        group=group,
    )


class _Request:
    """The parts of a request, read column by column."""

    def __init__(
        self,
        user: Mapping[str, Any],
        context: Mapping[str, Any],
        candidates: Sequence[Mapping[str, Any]],
        allowed: frozenset[str],
    ) -> None:
        self.user, self.context, self.candidates = user, context, candidates
        self.common = overlaid(user, context)
        self.columns = candidates.columns if isinstance(candidates, CandidateColumns) else None
        self.named = set().union(*candidates) if self.columns is None else set(self.columns)
        self.hashed: dict[_Part, tuple[Hashed, bool]] = {}
        if not (allowed.issuperset(self.common) and allowed.issuperset(self.named)):
            self._refuse(allowed)

    def _refuse(self, allowed: frozenset[str]) -> None:
        parts = [("user", self.user), ("context", self.context)]
        parts += [(f"candidates.{i}", c) for i, c in enumerate(self.candidates)]
        for path, part in parts:
            for name in part:
                if name not in allowed:
                    raise RequestError(
                        "no feature has this name",
                        where=f"{path}.{name if len(str(name)) <= 100 else str(name)[:97] + '...'}",
                        remedy=nearest(str(name), allowed),
                    )

    def gives(self, name: str) -> bool:
        """Say whether any part gives the column."""
        return name in self.common or name in self.named

    def values(self, name: str) -> tuple[list[Any], bool]:
        """Return the column: one value for all candidates and True, or one for each and False."""
        common = self.common.get(name)
        if name not in self.named:
            return [common], True
        if self.columns is not None:
            values = self.columns[name]
        else:
            try:
                values = list(map(itemgetter(name), self.candidates))
            except KeyError:
                values = [c.get(name) for c in self.candidates]
        if common is not None and NoneType in map(type, values):
            values = [common if one is None else one for one in values]
        return values, False

    def check_plain(self, name: str) -> None:
        """Refuse objects, and lists in lists, in a column that no feature reads: no log holds them."""
        values, same = self.values(name)
        if _PLAIN.issuperset(map(type, values)):
            return
        for i, value in enumerate(values):
            if isinstance(value, dict) or (isinstance(value, list) and not _PLAIN.issuperset(map(type, value))):
                raise RequestError(
                    "no value of a column is an object, or a list of more than values",
                    where=self.path(name, i, same),
                    remedy="give a number, text, or a list of these",
                )

    def path(self, name: str, row: int, same: bool) -> str:
        """Return where the value of a row was given."""
        if not same and self.candidates[row].get(name) is not None:
            return f"candidates.{row}.{name}"
        return f"{'context' if self.context.get(name) is not None else 'user'}.{name}"

    def canonical(self, value: Any, kind: Type, name: str, row: int, same: bool) -> Any:
        """Return the canonical form of a value, or refuse it with its path."""
        if type(value) is str and kind == "text" and value.isascii() and 0 < len(value) <= MAX_TEXT:
            return value  # as most are
        try:
            return canonical(value, kind)
        except ValueError as error:
            raise RequestError(
                str(error),
                where=self.path(name, row, same),
                remedy=f"{_WANTED[kind]}, or null when it is not known",
            ) from None


_WANTED: dict[Type, str] = {"integer": "give an integer", "float": "give a number", "text": "give text"}


class _Ids:
    """The ids of one table, by canonical Python value."""

    def __init__(self, table: Table) -> None:
        self.table, self.type = table, table.type
        self.python = _PYTHON[table.type]
        self.vocabulary = isinstance(table.encoding, Vocabulary)

    @cached_property
    def by_value(self) -> dict[Any, int]:
        """Every value of a vocabulary, and the missing one."""
        values, ids = self.table.known()
        return {**dict(zip(values.to_list(), ids.tolist(), strict=True)), None: MISSING}

    @cached_property
    def indexer(self) -> Callable[[pl.Series], np.ndarray]:
        """The function of the batch, for what is computed and not looked up."""
        return self.table.indexer()

    def of(self, values: list[Any], form: Callable[[Any, int], Any]) -> np.ndarray:
        """Return the ids of raw values, (N,) int32; ``form(value, place)`` gives the canonical one."""
        if not values:
            return np.empty(0, dtype=np.int32)
        if not self.vocabulary:
            return self.indexer(self._forms(values, form))
        get = self.by_value.get
        # A dictionary holds 1, 1.0 and True for one key, so only values of the very type go straight in.
        if not {self.python, NoneType}.issuperset(map(type, values)):
            values = [v if type(v) is self.python or v is None else form(v, i) for i, v in enumerate(values)]
        ids = np.fromiter(map(get, values, again(_UNSEEN)), dtype=np.int32, count=len(values))
        if ids.min() == _UNSEEN:
            for i in np.flatnonzero(ids == _UNSEEN).tolist():
                ids[i] = get(form(values[i], i), UNKNOWN)
        return ids

    def one(self, value: Any, form: Callable[[Any, int], Any]) -> int:
        """Return the id of a raw value of a vocabulary."""
        id_ = self.by_value.get(value) if type(value) is self.python or value is None else None
        return self.by_value.get(form(value, 0), UNKNOWN) if id_ is None else id_

    def _forms(self, values: list[Any], form: Callable[[Any, int], Any]) -> pl.Series:
        """Return the canonical forms of raw values; those of the very type are taken as a whole."""
        if {self.python, NoneType}.issuperset(map(type, values)):
            with suppress(OverflowError, TypeError, UnicodeEncodeError):  # the loop below says where
                series = pl.Series(values, dtype=DTYPES[self.type])
                if self.type != "text" or (series.str.len_bytes().max() or 0) <= MAX_TEXT:  # type: ignore[operator]
                    return canonical_series(series, self.type)
        return pl.Series([form(v, i) for i, v in enumerate(values)], dtype=DTYPES[self.type])


@dataclass(frozen=True)
class _Part:
    """A column that is crossed: where it is read, and the canonical type of its values."""

    key: str
    type: Type

    def hashed(self, request: _Request) -> tuple[Hashed, bool]:
        """Return the column's hashes, and whether one serves all candidates; many crosses may ask."""
        if self not in request.hashed:
            values, same = request.values(self.key)
            of, kind, key = request.canonical, self.type, self.key
            forms = [of(v, kind, key, i, same) for i, v in enumerate(values)]
            request.hashed[self] = Hashed.of(pl.Series(forms, dtype=DTYPES[self.type])), same
        return request.hashed[self]


class _Cross:
    """One cross of a request."""

    def __init__(self, ids: _Ids, parts: Sequence[_Part]) -> None:
        self.ids, self.parts = ids, parts

    def encode(self, request: _Request) -> tuple[np.ndarray, bool]:
        """Return ids, (N,) int32, and whether one serves all candidates."""
        found = [part.hashed(request) for part in self.parts]
        alike = all(same for _, same in found)
        size = len(request.candidates)
        every = [h if alike or not same else h.take(np.zeros(size, dtype=np.int64)) for h, same in found]
        return self.ids.indexer(cross_keys(every)), alike


class _Field:
    """One feature of a request."""

    def __init__(self, column: Column, state: FeatureState, ids: _Ids | None) -> None:
        self.column, self.kind, self.ids = column, column.kind, ids
        self.key = column.name if column.from_log else column.column
        self.table = None if ids is None else ids.table
        self.encoding, self.moments = column.encoding, state.moments.get(column.name)

    def encode(self, values: list[Any], request: _Request, same: bool) -> _Values:
        """Encode raw values, one a row."""
        if self.kind == "categorical":
            assert self.ids is not None
            kind, key = self.ids.type, self.key
            if same and self.ids.vocabulary:
                return self.ids.one(values[0], lambda v, i: request.canonical(v, kind, key, i, same))
            return self.ids.of(values, lambda v, i: request.canonical(v, kind, key, i, same))
        if self.kind == "numeric":
            x = self._numbers(values, request, same)
            if isinstance(self.encoding, Standard):
                assert self.moments is not None
                return standardise(x, self.encoding, self.moments)
            assert self.table is not None
            return self.table.bucket_ids(x)
        return self._lists(values, request, same)

    def _numbers(self, values: list[Any], request: _Request, same: bool) -> np.ndarray:
        if _NUMBERS.issuperset(map(type, values)):
            with suppress(OverflowError):  # the loop below says where
                return np.array(values, dtype=np.float64) + 0.0  # None becomes NaN, and -0.0 becomes 0.0
        out = np.empty(len(values))
        for i, value in enumerate(values):
            kind = type(value)
            if kind is not float and not (kind is int and -EXACT < value < EXACT):
                value = request.canonical(value, "float", self.key, i, same)
                value = np.nan if value is None else value
            out[i] = value + 0.0
        return out

    def _lists(self, values: list[Any], request: _Request, same: bool) -> Ragged:
        """Encode lists; one that several candidates in a row share, as those of a user do, once."""
        if len(values) > 1:
            objects = np.fromiter(map(id, values), dtype=np.int64, count=len(values))
            new = np.concatenate(([True], objects[1:] != objects[:-1]))
            if not new.all():
                places = np.flatnonzero(new).tolist()
                distinct = self._distinct([values[i] for i in places], places, request, same)
                repeated = take(distinct, np.cumsum(new) - 1)
                assert isinstance(repeated, Ragged)
                return repeated
        return self._distinct(values, range(len(values)), request, same)

    def _distinct(self, values: list[Any], places: Sequence[int], request: _Request, same: bool) -> Ragged:
        """Encode the lists of the candidates ``places``, all elements at once."""
        assert self.ids is not None
        kind, limit = self.ids.type, self.column.max_length
        lists: list[Sequence[Any]] = values
        if not all(type(one) is list and len(one) <= MAX_VALUES for one in values):
            lists = [self._elements(one, request, i, same) for one, i in zip(values, places, strict=True)]
        elements = list(chain.from_iterable(lists))
        ends = list(accumulate(map(len, lists)))

        def form(element: Any, i: int) -> Any:
            return request.canonical(element, kind, self.key, places[bisect_right(ends, i)], same)

        ids = self.ids.of(elements, form)
        encoded = _only(Ragged(ids, np.array([0, *ends])), ids != MISSING)
        if max(map(len, lists), default=0) > limit:
            lengths = np.diff(encoded.offsets)
            place = np.arange(len(encoded.values)) - np.repeat(encoded.offsets[:-1], lengths)
            if self.column.kind == "sequence":  # the last ones
                place = np.repeat(lengths - 1, lengths) - place
            encoded = _only(encoded, place < limit)
        return encoded

    def _elements(self, value: Any, request: _Request, row: int, same: bool) -> Sequence[Any]:
        if value is None:
            return ()
        problem = ""
        if isinstance(value, str):
            if self.column.separator is None:
                problem = "expected a list, found text"
            elif len(value) > MAX_TEXT:
                problem = f"text of {len(value):,} characters; at most {MAX_TEXT:,} are taken"
            else:
                return value.split(self.column.separator)
        elif not isinstance(value, list | tuple | np.ndarray | pl.Series):
            problem = f"expected a list, found {type(value).__name__}"
        elif len(value) > MAX_VALUES:
            problem = f"a list of {len(value):,} values; at most {MAX_VALUES:,} are taken"
        else:
            return (
                value
                if isinstance(value, list | tuple)
                else value.tolist()
                if isinstance(value, np.ndarray)
                else value.to_list()
            )
        raise RequestError(
            problem,
            where=request.path(self.key, row, same),
            remedy="give a list of values, oldest first in a history",
        )


def _only(ragged: Ragged, kept: np.ndarray) -> Ragged:
    """Return some of the ids of every row, those where ``kept`` is true."""
    if kept.all():
        return ragged
    before = np.concatenate(([0], np.cumsum(kept)))
    return Ragged(ragged.values[kept], before[ragged.offsets])
