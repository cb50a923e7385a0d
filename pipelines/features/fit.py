"""Fitting: one pass over the training rows that counts, measures and summarises every column."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import polars as pl

from pipelines.features.canonical import DTYPES, Type, canonical_series, numbers, type_of
from pipelines.features.columns import Coded, RawColumn
from pipelines.features.crosses import KEYS, Crosser
from pipelines.features.encoders import flat_lists, hash_ids, log_ids, prepared
from pipelines.features.spec import Column, FeatureSpec, Hash, LogBucket, Quantile, Standard, Vocabulary
from pipelines.features.state import FeatureState, Table
from pipelines.features.summaries import Counter, Moments, Quantiles
from pipelines.features.validate import check_schema, naming, reading

CHUNK = 65_536
"""Rows that are looked at together."""


def types_of(spec: FeatureSpec, schema: Mapping[str, pl.DataType]) -> dict[str, Type]:
    """Return the canonical type of every raw column that is encoded."""
    names = dict.fromkeys([c.column for c in spec.direct] + ([spec.user] if spec.user else []))
    return {name: type_of(schema[name]) or "text" for name in names}


def count(spec: FeatureSpec, frame: pl.LazyFrame, *, source: str) -> FeatureState:
    """Summarise raw rows; see :meth:`FeatureState.count`."""
    with reading(source):
        schema = frame.collect_schema()
    check_schema(spec, schema, source)
    fitter = Fitter(spec, types_of(spec, schema), source)
    for batch in batches(frame.select(fitter.columns), source):
        fitter.add({name: batch[name] for name in fitter.columns}, len(batch))
    return fitter.state()


def batches(frame: pl.LazyFrame, source: str) -> Iterator[pl.DataFrame]:
    """Yield a frame's rows in their order, ``CHUNK`` at a time, so that sums don't hang on the engine's threads."""
    with reading(source):
        yield from frame.collect_batches(chunk_size=CHUNK, maintain_order=True, engine="streaming")


class Fitter:
    """Takes the training rows in chunks and gives the summed-up state.

    A shared table is fitted on its owner's values and on those of every column that shares it, except a
    history made from a column that is counted already.

    Args:
        spec: the definition.
        types: canonical type of each raw column.
        source: the file that messages name.
    """

    def __init__(self, spec: FeatureSpec, types: dict[str, Type], source: str) -> None:
        self._spec, self._types, self._source = spec, types, source
        self._uses: dict[str, list[_Use]] = {}
        self._tables: dict[str, _TableFit] = {}
        self._moments: dict[str, _MomentsFit] = {}
        self._codes: dict[str, tuple[pl.Series, np.ndarray]] = {}
        self._rows = 0
        counted = set()
        owners_first = sorted(spec.direct, key=lambda c: c.table not in (None, c.name))
        for c in owners_first:
            if isinstance(c.encoding, Standard):
                self._moments[c.name] = _MomentsFit(c.encoding)
                self._uses.setdefault(c.column, []).append(self._moments[c.name])
                continue
            owner = spec.owner(c)
            if owner.name not in self._tables:
                kind: Type = "float" if owner.kind == "numeric" else types[owner.column]
                self._tables[owner.name] = _TableFit(owner, kind)
            lists = c.kind in ("multi", "sequence") and c.from_log is None
            key = (owner.name, c.column, c if lists else None)
            if key not in counted:
                counted.add(key)
                self._uses.setdefault(c.column, []).append(_Contribution(self._tables[owner.name], c, lists))
        self._crosser = Crosser(spec, types, source)
        self._tables |= {c.name: _TableFit(c, KEYS) for c in spec.crosses}

    @property
    def columns(self) -> list[str]:
        """The raw columns that are read."""
        return list(self._uses)

    def add(self, chunk: Mapping[str, RawColumn], rows: int, chosen: np.ndarray | None = None) -> None:
        """Take the next rows.

        Args:
            chunk: the raw columns; a coded one must have the same values in every chunk.
            rows: their number.
            chosen: (rows,) bool, the rows to count; all by default.
        """
        self._rows += rows if chosen is None else int(chosen.sum())
        keep = None if chosen is None or chosen.all() else chosen
        for name in self._uses:
            column = chunk[name]
            if isinstance(column, Coded):
                index = column.index if keep is None else column.index[keep]
                if name not in self._codes:
                    self._codes[name] = (column.values, np.zeros(len(column.values) + 1, dtype=np.int64))
                seen = self._codes[name][1]
                if len(seen) < len(index):
                    seen += np.bincount(index + 1, minlength=len(seen))
                else:  # adding up whole arrays would cost more than the rows do
                    np.add.at(seen, index + 1, 1)
            else:
                self._take(name, column if keep is None else column.filter(pl.Series(keep)), None)
        for name, keys in self._crosser.keys(chunk):
            self._tables[name].values(keys if keep is None else keys.filter(pl.Series(keep)), None)

    def _take(self, name: str, values: pl.Series, counts: np.ndarray | None) -> None:
        for use in self._uses[name]:
            with naming(self._source, name):
                use.take(values, counts)

    def state(self) -> FeatureState:
        """Return the state, without ids."""
        for name, (values, seen) in self._codes.items():
            there = np.flatnonzero(seen[1:])
            self._take(name, values[there], seen[1:][there])
            if seen[0]:
                self._take(name, pl.Series(values.name, [None], dtype=values.dtype), seen[:1])
        self._codes.clear()
        with ThreadPoolExecutor() as pool:
            tables = list(pool.map(_TableFit.table, self._tables.values()))
        return FeatureState(
            self._spec,
            self._types,
            dict(zip(self._tables, tables, strict=True)),
            {name: fit.moments for name, fit in self._moments.items()},
            self._rows,
        )


class _Use:
    """What one feature does with the values of its raw column."""

    def take(self, values: pl.Series, counts: np.ndarray | None) -> None:
        """Take raw values, each once or ``counts`` times."""
        raise NotImplementedError


class _MomentsFit(_Use):
    def __init__(self, encoding: Standard) -> None:
        self.encoding, self.moments = encoding, Moments()

    def take(self, values: pl.Series, counts: np.ndarray | None) -> None:
        x = prepared(numbers(values), self.encoding)
        if counts is not None:  # a dictionary's values, whose order threads decide; sums hang on it
            order = np.lexsort((counts, x))
            x, counts = x[order], counts[order]
        self.moments = self.moments.merge(Moments.of(x, counts))


class _TableFit:
    """Counts for one table."""

    def __init__(self, owner: Column, kind: Type) -> None:
        self.owner, self.kind, self.encoding = owner, kind, owner.encoding
        self.counter = Counter(DTYPES[kind]() if isinstance(self.encoding, Vocabulary) else pl.Int64())
        self.quantiles, self.missing = Quantiles.empty(), 0

    def values(self, values: pl.Series, counts: np.ndarray | None, distinct: bool = False) -> None:
        """Take canonical values."""
        if values.null_count():
            known = values.is_not_null().to_numpy()
            self.missing += int(len(known) - known.sum() if counts is None else counts[~known].sum())
            values, counts = values.drop_nulls(), None if counts is None else counts[known]
        if isinstance(self.encoding, Hash):
            values = pl.Series(hash_ids(values, self.encoding.buckets, self.encoding.salt)).cast(pl.Int64)
            distinct = False
        self.counter.add(values, counts, distinct=distinct)

    def numbers(self, x: np.ndarray, counts: np.ndarray | None) -> None:
        """Take numbers, NaN where missing."""
        known = ~np.isnan(x)
        self.missing += int((~known).sum() if counts is None else counts[~known].sum())
        x, counts = x[known], None if counts is None else counts[known]
        if isinstance(self.encoding, Quantile):
            self.quantiles = self.quantiles.merge(Quantiles.of(x, counts))
        else:
            assert isinstance(self.encoding, LogBucket)
            self.counter.add(pl.Series(log_ids(x, self.encoding)).cast(pl.Int64), counts)

    def table(self) -> Table:
        """Return the table, without ids where these are to be given."""
        empty = np.empty(0, dtype=np.int64)
        frame = self.counter.frame()
        table = Table(
            self.owner.name,
            self.kind,
            self.encoding,
            frame["value"][:0],
            empty,
            empty.astype(np.int32),
            self.missing,
            self.quantiles,
        )
        fixed = pl.lit(0) if isinstance(self.encoding, Vocabulary) else pl.col("value")
        return table.counted(frame.with_columns(fixed.alias("id")))


class _Contribution(_Use):
    """A column's share in its table."""

    def __init__(self, table: _TableFit, column: Column, lists: bool) -> None:
        self.table, self.column, self.lists = table, column, lists

    def take(self, values: pl.Series, counts: np.ndarray | None) -> None:
        if self.column.kind == "numeric":
            self.table.numbers(numbers(values), counts)
            return
        if self.lists:
            values, lengths = flat_lists(values, self.column)
            counts = None if counts is None else np.repeat(counts, lengths)
        # Values with counts are a dictionary's; read as another type, two of them may become one.
        distinct = counts is not None and not self.lists and values.dtype == DTYPES[self.table.kind]
        self.table.values(canonical_series(values, self.table.kind), counts, distinct)
