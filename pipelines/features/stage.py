"""The staged log: the raw source scanned once, checked, typed and coded, so that all later passes are cheap.

Text becomes 32-bit codes into a dictionary that lives in memory while the source is read; what only feeds
numbers becomes float64. Encoding a text column later means encoding its dictionary once, then one look-up a row.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, TypeVarTuple

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from ctr_models.errors import DataError
from pipelines.features.canonical import Type, is_list, numbers, type_of
from pipelines.features.columns import Coded, RawColumn
from pipelines.features.fit import CHUNK, types_of
from pipelines.features.spec import FeatureSpec
from pipelines.features.validate import ContentCheck, check_rows, check_schema, reading, time_key

WORKERS = min(4, os.cpu_count() or 1)
TIME = "__time__"
IN_MEMORY = 256 * 2**20
"""Bytes of typed rows up to which a log stays in memory."""


@dataclass(frozen=True)
class Source:
    """Rows as they came, and the file that messages name."""

    name: str
    frame: pl.LazyFrame
    path: Path


class TypedRows:
    """The typed rows of a log, in pieces of ``CHUNK`` at most: in memory while they are few, else in a file.

    Args:
        file: where the Parquet file is written, if need be.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._held: list[pa.Table] = []
        self._bytes = 0
        self._writer: pq.ParquetWriter | None = None

    def add(self, piece: pa.Table) -> None:
        """Take the next rows."""
        self._bytes += piece.nbytes
        self._held.append(piece)
        if self._writer is None:
            if self._bytes <= IN_MEMORY:
                return
            # Read twice and thrown away: packing it would cost more time than it saves.
            self._writer = open_writer(self._file, piece.schema, compression="none")
        for held in self._held:
            self._writer.write_table(held, row_group_size=CHUNK)
        self._held.clear()

    def close(self) -> None:
        """End the file, if there is one."""
        if self._writer is not None:
            self._writer.close()

    def pieces(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Yield the rows in order, the wanted columns only."""
        if self._writer is None:
            yield from (piece.select(columns) for piece in self._held)
            return
        with pq.ParquetFile(self._file) as file, ThreadPoolExecutor(1) as reader:

            def read(group: int) -> pa.Table:
                return file.read_row_group(group, columns=list(columns), use_threads=False)

            yield from ordered(reader, read, ((group,) for group in range(file.num_row_groups)), 1)


@dataclass(frozen=True)
class Staged:
    """A log ready for fitting and encoding.

    Args:
        log: the typed rows.
        dictionaries: distinct texts by column; the rows hold their places, -1 where missing.
        parts: first and last row + 1 of every part of the source, by name.
        types: canonical types of the encoded columns.
        dtypes: of the source's columns.
        timed: whether column ``__time__`` is there.
        coders: what found the places of the texts.
    """

    log: TypedRows
    dictionaries: dict[str, pl.Series]
    parts: dict[str, tuple[int, int]]
    types: dict[str, Type]
    dtypes: dict[str, pl.DataType]
    timed: bool
    coders: dict[str, Codes]

    @property
    def rows(self) -> int:
        """Rows of all parts."""
        return max(stop for _, stop in self.parts.values())

    def chunks(self, columns: Sequence[str]) -> Iterator[tuple[slice, dict[str, RawColumn]]]:
        """Yield the rows in order: which they are, and the wanted columns (labels and ``__time__`` too)."""
        start = 0
        for piece in self.log.pieces(columns):
            yield slice(start, start + piece.num_rows), {n: self._column(n, piece[n]) for n in columns}
            start += piece.num_rows

    def whole(self, column: str) -> RawColumn:
        """Return one column of all rows."""
        return self._column(column, pa.concat_tables(self.log.pieces([column]))[column])

    def numbers(self, column: str) -> np.ndarray:
        """Return a label, or ``__time__``, of all rows, (N,)."""
        values = self.whole(column)
        assert isinstance(values, pl.Series)
        return values.to_numpy()

    def places(self, column: str, texts: pl.Series) -> np.ndarray:
        """Return the place of each text in a column's dictionary, (K,) int64; -1 where it isn't there."""
        found = self.coders[column].of(texts).astype(np.int64)
        return np.where(found < len(self.dictionaries[column]), found, -1)

    def _column(self, name: str, column: pa.ChunkedArray) -> RawColumn:
        if name in self.dictionaries:
            return Coded(self.dictionaries[name], column.to_numpy())
        return pl.Series(name, column)


def stage(
    sources: Sequence[Source],
    spec: FeatureSpec,
    folder: Path,
    *,
    keep: Sequence[str] = (),
    timed: bool = False,
    on_rows: Callable[[int], None] = lambda rows: None,
) -> Staged:
    """Read every source once, check it, and write the typed log.

    Args:
        sources: the parts, in order.
        spec: the definition.
        folder: where the typed log is written.
        keep: further columns that must be there.
        timed: whether the timestamp is needed.
        on_rows: told how many rows have passed.

    Raises:
        DataError: naming file, column, row and remedy.
    """
    schemas = []
    for source in sources:
        with reading(str(source.path)):
            schemas.append(source.frame.collect_schema())
        try:
            check_schema(spec, schemas[-1], str(source.path), keep)
        except DataError:  # a CSV of a header alone has only columns of text, which is not what is wrong with it
            check_rows(source.frame, str(source.path))
            raise
    dtypes = {name: _common(name, schemas, sources) for name in (*spec.raw_columns, *keep)}
    return _Stager(spec, dtypes, folder, keep, timed).run(sources, on_rows)


def _common(name: str, schemas: Sequence[Mapping[str, pl.DataType]], sources: Sequence[Source]) -> pl.DataType:
    """The type that a column has in every part."""
    found = list(dict.fromkeys(_plain(schema[name]) for schema in schemas))
    if len(found) == 1:
        return found[0]
    known = [d for d in found if d != pl.Null]
    if len({type_of(d) for d in known}) == 1 and not any(is_list(d) for d in known):
        return {"integer": pl.Int64(), "float": pl.Float64(), "text": pl.String()}.get(
            str(type_of(known[0])), known[0]
        )
    if {type_of(d) for d in known} == {"integer", "float"} and not any(is_list(d) for d in known):
        return pl.Float64()
    first, other = found[0], next(i for i, schema in enumerate(schemas) if _plain(schema[name]) != found[0])
    raise DataError(
        f"{schemas[other][name]} here, but {first} in {sources[0].path}",
        where=f"{sources[other].path}: column {name}",
        remedy="write the parts with the same types",
    )


def _plain(dtype: pl.DataType) -> pl.DataType:
    """A type without the categories or the fixed length that only memory knows of."""
    if isinstance(dtype, pl.Categorical | pl.Enum):
        return pl.String()
    if isinstance(dtype, pl.List | pl.Array):
        inner = dtype.inner
        return pl.List(_plain(inner() if isinstance(inner, type) else inner))
    return dtype


class _Stager:
    def __init__(
        self, spec: FeatureSpec, dtypes: dict[str, pl.DataType], folder: Path, keep: Sequence[str], timed: bool
    ) -> None:
        self.spec, self.dtypes, self.timed = spec, dtypes, timed
        self.types = types_of(spec, dtypes)
        self.log = TypedRows(folder / "log.parquet")
        self.raw = [n for n in self.types if n != spec.label or any(c.column == n for c in spec.direct)]
        self.raw += [n for n in (*spec.keep, *keep) if n not in self.raw]
        # A column that only feeds numbers is kept as numbers; text that is only kept is not worth a dictionary.
        used = {n: {c.kind for c in spec.direct if c.column == n} for n in self.raw}
        self.numbers = {
            n
            for n in self.raw
            if used[n] == {"numeric"} and n not in (spec.user, *spec.keep, *keep) and dtypes[n].is_numeric()
        }
        coded = [n for n in self.raw if n in self.types and type_of(dtypes[n]) == "text" and not is_list(dtypes[n])]
        self.codes = {n: Codes() for n in coded}
        self.sizes = dict.fromkeys(coded, 1)
        self.parts: dict[str, tuple[int, int]] = {}
        self.done = 0

    def run(self, sources: Sequence[Source], on_rows: Callable[[int], None]) -> Staged:
        try:
            with ThreadPoolExecutor(WORKERS) as pool:
                for source in sources:
                    first = self.done
                    check = ContentCheck(self.spec, str(source.path))
                    self._read(source, check, pool, on_rows)
                    check.finish()
                    self.parts[source.name] = (first, self.done)
        finally:
            self.log.close()
        dictionaries = {name: codes.dictionary(name, self.sizes[name]) for name, codes in self.codes.items()}
        staged = Staged(self.log, dictionaries, self.parts, self.types, self.dtypes, self.timed, self.codes)
        self._check_texts(staged, sources)
        return staged

    def _read(
        self, source: Source, check: ContentCheck, pool: ThreadPoolExecutor, on_rows: Callable[[int], None]
    ) -> None:
        """Pass one source by: polars reads, our threads type and code, the file is written in order."""
        wanted = dict.fromkeys((*self.spec.raw_columns, *self.raw))
        typed = source.frame.select(pl.col(n).cast(self.dtypes[n]) for n in wanted)
        failure: list[BaseException] = []
        waiting: deque[Future[pa.Table]] = deque()

        def pass_by(frame: pl.DataFrame) -> bool:
            try:
                if len(frame):
                    first = check.rows + 1
                    waiting.append(pool.submit(self._typed, frame, check.batch(frame), check.source, first))
                if len(waiting) > WORKERS:
                    on_rows(self._write(waiting.popleft().result()))
            except BaseException as error:  # polars would wrap it in an error of its own
                failure.append(error)
                return True
            return False

        try:
            with reading(str(source.path)):
                typed.sink_batches(pass_by, chunk_size=CHUNK, maintain_order=True, engine="streaming")
        finally:
            if failure:
                raise failure[0]
        while waiting:
            on_rows(self._write(waiting.popleft().result()))

    def _typed(self, frame: pl.DataFrame, labels: dict[str, np.ndarray], source: str, first: int) -> pa.Table:
        out: dict[str, pa.Array] = {}
        for name in self.raw:
            if name in self.codes:
                out[name] = pa.array(self.codes[name].of(frame[name]))
            elif name in self.numbers:
                out[name] = pa.array(numbers(frame[name]))
            else:
                out[name] = frame[name].rechunk().to_arrow()
        out |= {column: pa.array(values) for column, values in labels.items()}
        if self.timed:
            assert self.spec.timestamp is not None
            out[TIME] = pa.array(time_key(frame[self.spec.timestamp], source, first))
        return pa.table(out)

    def _write(self, table: pa.Table) -> int:
        for name in self.codes:
            self.sizes[name] = max(self.sizes[name], int(table[name].to_numpy().max()) + 1)
        self.log.add(table)
        self.done += table.num_rows
        return table.num_rows

    def _check_texts(self, staged: Staged, sources: Sequence[Source]) -> None:
        for name, values in staged.dictionaries.items():
            bad = ContentCheck(self.spec, "").bad_text(name, values)
            if bad is None:
                continue
            place, problem, remedy = bad
            coded = staged.whole(name)
            assert isinstance(coded, Coded)
            row = int(np.flatnonzero(coded.index == place)[0])
            source = next(s for s in sources if row < self.parts[s.name][1])
            where = f"{source.path}: column {name}, row {row - self.parts[source.name][0] + 1}"
            raise DataError(problem, where=where, remedy=remedy)


class Codes:
    """Numbers for the texts of one column, in no order; the empty text is 0. Threads may share it."""

    def __init__(self) -> None:
        self._type = pl.Categorical(pl.Categories.random())
        # polars drops the table of categories with the last Series of its type.
        self._alive = pl.Series([""], dtype=pl.String).cast(self._type)

    def of(self, values: pl.Series) -> np.ndarray:
        """Return the code of each text, (N,) int32, -1 for null."""
        codes = values.cast(pl.String).cast(self._type).to_physical()
        # The largest unsigned number, read as a signed one, is -1.
        return codes.fill_null(2**32 - 1).to_numpy().view(np.int32)

    def dictionary(self, name: str, size: int) -> pl.Series:
        """Return the first ``size`` texts by code."""
        codes = pl.Series(name, np.arange(size, dtype=np.uint32))
        return codes.cat.to(self._type).cast(pl.String)


_In = TypeVarTuple("_In")
_Out = TypeVar("_Out")


def ordered(
    pool: ThreadPoolExecutor, work: Callable[[*_In], _Out], items: Iterable[tuple[*_In]], ahead: int
) -> Iterator[_Out]:
    """Yield ``work(*item)`` of every item in order, at most ``ahead`` results before they are asked for."""
    waiting: deque[Future[_Out]] = deque()
    for item in items:
        waiting.append(pool.submit(work, *item))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def open_writer(file: Path, schema: pa.Schema, compression: str = "lz4") -> pq.ParquetWriter:
    """Open a Parquet file for columns that are mostly numbers: their bytes are split into streams."""
    flat = [f.name for f in schema if pa.types.is_floating(f.type) or pa.types.is_integer(f.type)]
    lists = [f"{f.name}.list.element" for f in schema if pa.types.is_list(f.type) or pa.types.is_large_list(f.type)]
    numeric = [
        f"{f.name}.list.element"
        for f in schema
        if (pa.types.is_list(f.type) or pa.types.is_large_list(f.type))
        and (pa.types.is_integer(f.type.value_type) or pa.types.is_floating(f.type.value_type))
    ]
    split = [*flat, *numeric]
    others = [f.name for f in schema if f.name not in flat and f"{f.name}.list.element" not in lists]
    others += [name for name in lists if name not in numeric]
    return pq.ParquetWriter(
        file,
        schema,
        compression=compression,
        use_dictionary=others,
        use_byte_stream_split=split,
        write_statistics=False,
    )
