"""Raw rows to encoded columns, and encoded columns to what a Batch is cut from."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import polars as pl
import pyarrow as pa

from ctr_models.batch import EncodedRows, Ragged
from ctr_models.errors import DataError
from ctr_models.schema import Schema
from pipelines.features.canonical import canonical_series, numbers
from pipelines.features.crosses import Crosser
from pipelines.features.encoders import flat_lists, standardise, user_ids
from pipelines.features.sequences import add_histories
from pipelines.features.spec import LABEL, Column, Standard, task_label
from pipelines.features.state import FeatureState
from pipelines.features.validate import check_types, naming, reading

USER, ROW = "__user__", "__row__"
_REMEDY = "give the type that the model was fitted on"

Encoded = np.ndarray | Ragged


class Encoder:
    """Encodes raw columns by a FeatureState, keeping the vocabularies' indexes between batches.

    Args:
        state: fitted.
    """

    def __init__(self, state: FeatureState) -> None:
        self.state = state
        self._indexers: dict[str, Callable[[pl.Series], np.ndarray]] = {}

    def column(self, column: Column, values: pl.Series) -> Encoded:
        """Encode one feature: (N,) float32 of a number, (N,) int32 of a category, ids a row of the others.

        A sequence is given as lists, also when it is made from the log.

        Raises:
            ValueError: a value is not of the column's type.
        """
        encoding = column.encoding
        if isinstance(encoding, Standard):
            return standardise(numbers(values), encoding, self.state.moments[column.name])
        table = self.state.table(column)
        if column.kind == "numeric":
            return table.bucket_ids(numbers(values))
        if column.kind == "categorical":
            return self.ids(table.name, values)
        elements, lengths = flat_lists(values, column)
        offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
        np.cumsum(lengths, out=offsets[1:])
        return Ragged(self.ids(table.name, elements), offsets)

    def ids(self, table: str, values: pl.Series) -> np.ndarray:
        """Return the id of each raw value in a table, (N,) int32."""
        if table not in self._indexers:
            self._indexers[table] = self.state.tables[table].indexer()
        return self._indexers[table](canonical_series(values, self.state.tables[table].type))

    def users(self, values: pl.Series) -> np.ndarray:
        """Return the stable numbers of raw user values, (N,) int64."""
        assert self.state.spec.user is not None
        return user_ids(canonical_series(values, self.state.types[self.state.spec.user]))


def transform(state: FeatureState, frame: pl.LazyFrame, *, source: str) -> pl.LazyFrame:
    """Encode raw rows, in batches, as the nightly run does.

    A history is read from a list column of its name; where there is none and the frame is a log (it has the
    label, the user and the time), it is made from the frame's own rows, which are then held in memory. Any
    other column that the frame lacks is missing in every row; without the label, labels are 0, without a task's,
    they are unknown.

    Args:
        state: fitted.
        frame: raw rows.
        source: the file that messages name.

    Returns:
        Columns in the order of ``state.schema()``, then ``__label__`` and those of tasks, ``__user__``, ``__row__``
        and those that the spec keeps.

    Raises:
        DataError: a column has a type that it can't have, or a value that is not of its type.

    Example:
        >>> from pipelines.features.spec import FeatureSpec
        >>> ad = {"name": "ad", "kind": "categorical"}
        >>> spec = FeatureSpec.model_validate({"label": "click", "columns": [ad]})
        >>> state = FeatureState.fit(spec, pl.LazyFrame({"click": [0, 1], "ad": ["a", "a"]}), source="log")
        >>> transform(state, pl.LazyFrame({"ad": ["a", "b", None]}), source="log").collect()["ad"].to_list()
        [2, 1, 0]
    """
    spec = state.spec
    with reading(source):
        schema = frame.collect_schema()
    check_types(spec, schema, source)
    made = [c for c in spec.columns if c.from_log is not None and c.name not in schema]
    log_columns = [spec.label, spec.user, spec.timestamp, *(c.column for c in made)]
    if made and all(name in schema for name in log_columns):
        with reading(source):
            frame = add_histories(spec, frame.collect(), source=source).lazy()
        schema = frame.collect_schema()
    kept = [name for name in spec.keep if name in schema]
    wanted = [*spec.request_columns, *spec.labels.values(), *([spec.user] if spec.user else []), *kept]
    there = [name for name in dict.fromkeys(wanted) if name in schema]
    encoder, crosser = Encoder(state), Crosser(spec, state.types, source)
    names = [f.name for f in state.schema().fields]
    columns = {c.name: c for c in spec.columns}

    def encode(batch: pl.DataFrame) -> pl.DataFrame:
        nothing = pl.Series([None] * len(batch), dtype=pl.Null)
        encoded: dict[str, Encoded] = {}
        for c in spec.direct:
            raw = c.name if c.from_log else c.column
            with naming(source, raw, _REMEDY):
                encoded[c.name] = encoder.column(c, batch[raw] if raw in there else nothing)
        parts = {columns[name].column: nothing for name in crosser.parts}
        parts |= {raw: batch[raw] for raw in parts if raw in there}
        encoded |= {name: encoder.ids(name, keys) for name, keys in crosser.keys(parts)}
        out = [_series(name, encoded[name]) for name in names]
        for name, raw in spec.labels.items():
            absent = 0.0 if name == LABEL else np.nan
            values = batch[raw] if raw in there else nothing
            out.append(values.cast(pl.Float32).fill_null(absent).alias(name))
        with naming(source, str(spec.user), _REMEDY):
            user = encoder.users(batch[spec.user]) if spec.user in there else np.zeros(len(batch), dtype=np.int64)
        out.append(pl.Series(USER, user))
        out.append(batch[ROW])
        return pl.DataFrame(out + [batch[name] for name in kept])

    types = {f.name: pl.Float32() for f in state.schema().dense}
    encoded_schema: dict[str, pl.DataType] = {
        **types,
        **{f.name: pl.Int32() if f.kind == "categorical" else pl.List(pl.Int32) for f in state.schema().sparse},
        **{f.name: pl.List(pl.Int32) for f in state.schema().sequences},
        **dict.fromkeys(spec.labels, pl.Float32()),
        USER: pl.Int64(),
        ROW: pl.Int64(),
        **{name: schema[name] for name in kept},
    }
    # The index first: a frame without any of the columns still has its rows.
    rows = frame.with_row_index(ROW).select(*there, pl.col(ROW).cast(pl.Int64))
    return rows.map_batches(encode, schema=pl.Schema(encoded_schema), streamable=True, validate_output_schema=False)


def _series(name: str, values: Encoded) -> pl.Series:
    if isinstance(values, np.ndarray):
        return pl.Series(name, values)
    return pl.Series(name, arrow_lists(values))


def arrow_lists(values: Ragged) -> pa.Array:
    """Return ids a row as an Arrow list column."""
    return pa.LargeListArray.from_arrays(pa.array(values.offsets), pa.array(values.values))


def encoded_rows(table: pa.Table | pl.DataFrame, schema: Schema) -> EncodedRows:
    """Turn encoded columns into the rows that a Batch is cut from.

    Args:
        table: encoded columns; label and user may be absent, and are 0 then, those of tasks unknown.
        schema: the fields that are wanted, in their order.

    Raises:
        DataError: a field is absent.

    Example:
        >>> schema = Schema.of({"ad": 9}, dense=["price"])
        >>> rows = encoded_rows(pl.DataFrame({"ad": [2, 3], "price": [0.5, 1.5]}), schema)
        >>> rows.single.tolist(), rows.dense.ravel().tolist()
        ([[2, 3]], [0.5, 1.5])
    """
    if isinstance(table, pl.DataFrame):
        table = table.to_arrow()
    absent = [f.name for f in schema.fields if f.name not in table.column_names]
    if absent:
        raise DataError(
            "no such column in the encoded rows",
            where=f"column {absent[0]}",
            remedy="encode the data again with the features that the model was built for",
        )
    size = table.num_rows
    dense = np.empty((size, len(schema.dense)), dtype=np.float32)
    for i, f in enumerate(schema.dense):
        dense[:, i] = _flat(table, f.name, np.float32)
    singles = [f.name for f in schema.sparse if f.kind == "categorical"]
    single = np.empty((len(singles), size), dtype=np.int32)
    for i, name in enumerate(singles):
        single[i] = _flat(table, name, np.int32)
    lists = [f.name for f in (*schema.sparse, *schema.sequences) if f.kind != "categorical"]
    return EncodedRows(
        schema=schema,
        dense=dense,
        single=single,
        ragged={name: _ragged(table[name]) for name in lists},
        # Copies: what Arrow owns is read-only, and torch warns of tensors that are.
        label=_flat(table, LABEL, np.float32).copy(),
        group=_flat(table, USER, np.int64).copy(),
        targets=_targets(table, schema),
    )


def _targets(table: pa.Table, schema: Schema) -> np.ndarray | None:
    """The labels of further tasks, (W, T); None if there are none."""
    if not schema.tasks:
        return None
    targets = np.full((table.num_rows, len(schema.tasks)), np.nan, dtype=np.float32)
    for i, task in enumerate(schema.tasks):
        if task_label(task) in table.column_names:
            targets[:, i] = table[task_label(task)].to_numpy()
    return targets


def _flat(table: pa.Table, name: str, dtype: type) -> np.ndarray:
    if name not in table.column_names:
        return np.zeros(table.num_rows, dtype=dtype)
    return table[name].to_numpy().astype(dtype, copy=False)


def _ragged(column: pa.ChunkedArray) -> Ragged:
    values, offsets, total = [np.empty(0, dtype=np.int32)], [np.zeros(1, dtype=np.int64)], 0
    for chunk in column.chunks:
        ends = chunk.offsets.to_numpy().astype(np.int64)
        if len(ends) < 2:
            continue
        values.append(chunk.values.to_numpy(zero_copy_only=False)[ends[0] : ends[-1]].astype(np.int32, copy=False))
        offsets.append(ends[1:] - ends[0] + total)
        total = int(offsets[-1][-1])
    return Ragged(np.concatenate(values), np.concatenate(offsets))


def take(values: Encoded, index: np.ndarray) -> Encoded:
    """Return the encoded rows ``index``, in that order."""
    if isinstance(values, np.ndarray):
        return values[index]
    ids, lengths = values.take(index)
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return Ragged(ids, offsets)


def repeat(values: Encoded, times: int) -> Encoded:
    """Return one encoded row ``times`` times."""
    return take(values, np.zeros(times, dtype=np.int64))
