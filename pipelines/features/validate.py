"""What a log must be before any work is done on it: its columns, their types, its labels and its times."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import polars as pl

from ctr_models.errors import DataError, nearest
from pipelines.features.canonical import MAX_TEXT, canonical, is_list, type_of
from pipelines.features.spec import Column, FeatureSpec, task_label


@contextmanager
def reading(source: str | Path) -> Iterator[None]:
    """Turn polars' complaint about a source into a DataError that names it."""
    try:
        yield
    except (pl.exceptions.PolarsError, OSError, UnicodeDecodeError) as error:
        source, reason = str(source), " ".join(str(error).split())
        if "found more fields than defined" in reason:
            row = _ragged_row(Path(source))
            raise DataError(
                "a row has more fields than the header",
                where=f"{source}: row {row}" if row else source,
                remedy="repair that row, or quote the field that holds the separator",
            ) from None
        reason = reason.split(" You might want to")[0]
        remedy = "the file may be truncated or of another format; write it again"
        if source.endswith(".csv"):
            remedy += ", or, if a column changes its type, name the type in data.options.types"
        raise DataError(
            f"can't be read ({reason if len(reason) <= 300 else reason[:297] + '...'})", where=source, remedy=remedy
        ) from None


@contextmanager
def naming(source: str, column: str, remedy: str = "write one type of value in a column") -> Iterator[None]:
    """Turn a complaint about a value into a DataError that names its file and column."""
    try:
        yield
    except ValueError as error:
        raise DataError(str(error), where=f"{source}: column {column}", remedy=remedy) from None


def _ragged_row(path: Path) -> int | None:
    """Row (from 1, header apart) of the first line with more fields than the first, if the file is simple text."""
    try:
        with open(path, encoding="utf-8") as file:
            first = file.readline()
            separator = max(",\t;|", key=first.count)
            for row, line in enumerate(file, 1):
                if '"' not in line and line.count(separator) > first.count(separator):
                    return row
    except (OSError, UnicodeDecodeError):
        pass
    return None


def check_rows(frame: pl.LazyFrame, source: str) -> None:
    """Look whether a log holds anything, reading one row.

    Raises:
        DataError: it doesn't.
    """
    with reading(source):
        empty = frame.head(1).collect().is_empty()
    if empty:
        raise _no_rows(source)


def _no_rows(source: str) -> DataError:
    return DataError("no rows", where=source, remedy="give a file that holds rows")


def check_schema(
    spec: FeatureSpec, schema: Mapping[str, pl.DataType], source: str, extra: Sequence[str] = ()
) -> None:
    """Hold the columns of a log against a spec, without reading a row.

    Args:
        spec: the definition.
        schema: names and types of the log's columns.
        source: the file that messages name.
        extra: further columns that must be there, such as the one that holds the split.

    Raises:
        DataError: a column is missing (the nearest name is given) or of a type that its kind can't take.
    """
    for name in (*spec.raw_columns, *extra):
        if name not in schema:
            raise DataError("no such column", where=f"{source}: column {name}", remedy=nearest(name, schema))
    check_types(spec, schema, source)


def check_types(spec: FeatureSpec, schema: Mapping[str, pl.DataType], source: str) -> None:
    """Hold the types of those columns of the spec that are there against it.

    Raises:
        DataError: a column is of a type that its kind can't take.
    """
    for name in spec.labels.values():
        label = schema.get(name)
        if label is not None and not (label.is_numeric() or label in (pl.Boolean, pl.Null)):
            raise _wrong(
                source, name, f"the label is {label}, not a number", "write it as 0 and 1, for example by a cast"
            )
    user = schema.get(spec.user or "")
    if user is not None and (type_of(user) is None or is_list(user)):
        raise _wrong(source, spec.user or "", f"the user is {user}", "write it as text or an integer")
    for column in spec.direct:
        if column.column in schema:
            _check_type(column, schema[column.column], source)


def _check_type(column: Column, dtype: pl.DataType, source: str) -> None:
    many = column.kind in ("multi", "sequence") and column.from_log is None
    if type_of(dtype) is None:
        remedy = "cast it to text, or derive numbers from it, such as the hour"
        raise _wrong(source, column.column, f"{dtype} can't be encoded as {column.kind}", remedy)
    if many and dtype != pl.Null and not is_list(dtype) and (column.separator is None or type_of(dtype) != "text"):
        remedy = "write lists, or name the separator of the text: separator: '|'"
        raise _wrong(source, column.column, f"a {column.kind} column needs a list, found {dtype}", remedy)
    if not many and is_list(dtype):
        remedy = "declare it kind: multi, or kind: sequence"
        raise _wrong(source, column.column, f"a {column.kind} column needs one value a row, found {dtype}", remedy)


def _wrong(source: str, column: str, problem: str, remedy: str) -> DataError:
    return DataError(problem, where=f"{source}: column {column}", remedy=remedy)


def time_key(times: pl.Series, source: str, first_row: int = 1) -> np.ndarray:
    """Return times as numbers that rise with them: microseconds of dates, or the column's own numbers.

    Args:
        times: dates, numbers, or ISO 8601 text.
        source: the file that messages name.
        first_row: number of the first row, for messages.

    Returns:
        (N,) int64 or float64.

    Raises:
        DataError: a time is missing or can't be parsed, naming its row.
    """
    dtype = times.dtype
    parsed: pl.Series
    if dtype == pl.String:
        parsed = _parsed(times)
    elif dtype.is_temporal() and dtype not in (pl.Duration, pl.Time):
        parsed = times.cast(pl.Datetime("us", getattr(dtype, "time_zone", None))).to_physical()
    elif dtype.is_integer():
        parsed = times.cast(pl.Int64)
    elif dtype.is_float():
        parsed = times.cast(pl.Float64).fill_nan(None)
    else:
        raise _wrong(source, times.name, f"{dtype} is no time", "use a date, a number, or ISO 8601 text")
    if parsed.null_count():
        row = int(parsed.is_null().arg_true()[0])
        value = times[row]
        problem = "the time is missing" if value is None or value != value else f"{value!r} is no time"
        raise DataError(
            problem,
            where=f"{source}: column {times.name}, row {first_row + row}",
            remedy="drop the row, or write a number, a date, or text such as 2026-01-31T12:00:00",
        )
    return parsed.to_numpy()


def _parsed(times: pl.Series) -> pl.Series:
    out = pl.Series(times.name, [None] * len(times), dtype=pl.Int64)
    for pattern in ("%Y-%m-%dT%H:%M:%S%.f%#z", "%Y-%m-%dT%H:%M:%S%.f", "%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%d"):
        if out.null_count() == 0:
            break
        found = times.str.to_datetime(pattern, time_unit="us", strict=False).to_physical()
        out = out.zip_with(out.is_not_null(), found)
    return out


class ContentCheck:
    """Looks at every batch of a log as it passes by.

    Args:
        spec: the definition.
        source: the file that messages name.
    """

    def __init__(self, spec: FeatureSpec, source: str) -> None:
        self.spec, self.source = spec, source
        self.rows = 0
        self._nulls: dict[str, int] = {}
        self._features = dict.fromkeys(c.column for c in spec.direct)
        self._values = dict.fromkeys((*self._features, *([spec.user] if spec.user else [])))
        self._numbers = {c.column for c in spec.direct if c.kind == "numeric"}

    def batch(self, frame: pl.DataFrame) -> dict[str, np.ndarray]:
        """Check the next rows and return their labels by encoded column, (N,) float32; of tasks, NaN where unknown.

        Raises:
            DataError: naming file, column and row.
        """
        labels = {column: self._labels(frame[name]) for column, name in self.spec.labels.items()}
        for name in self.spec.tasks:
            self._nulls[name] = self._nulls.get(name, 0) + int(np.isnan(labels[task_label(name)]).sum())
        for name in self._features:
            values = frame[name]
            self._nulls[name] = self._nulls.get(name, 0) + values.null_count()
        for name in self._values:
            values = frame[name]
            if values.dtype in (pl.UInt64, pl.Int128, pl.UInt128):
                over = values.is_not_null() & values.cast(pl.Int64, strict=False).is_null()
                if over.any():
                    row = int(over.arg_true()[0])
                    self._fail(name, row, f"{values[row]} does not fit a signed 64-bit integer", "cast it to text")
        self.rows += len(frame)
        return labels

    def bad_text(self, name: str, values: pl.Series) -> tuple[int, str, str] | None:
        """Look for a text that the column can't hold.

        Args:
            name: of the column.
            values: its distinct texts.

        Returns:
            Its place, what is wrong with it, and the remedy; None if all are well.
        """
        long = (values.str.len_chars() > MAX_TEXT).fill_null(False).arg_true()
        if len(long):
            size = len(values[int(long[0])])
            return (
                int(long[0]),
                f"text of {size:,} characters; at most {MAX_TEXT:,} are taken",
                "cut it, or drop the row",
            )
        if name in self._numbers:
            for place, value in enumerate(values.to_list()):
                try:
                    canonical(value, "float")
                except ValueError as error:
                    return place, str(error), "write numbers, or declare the column kind: categorical"
        return None

    def finish(self) -> None:
        """Check what only the whole log can tell.

        Raises:
            DataError: no row at all, or a column that is always null.
        """
        if self.rows == 0:
            raise _no_rows(self.source)
        for name, nulls in self._nulls.items():
            if nulls == self.rows:
                listed = "features.tasks" if name in self.spec.tasks else "features.columns"
                raise DataError(
                    f"every one of {self.rows:,} values is null",
                    where=f"{self.source}: column {name}",
                    remedy=f"drop the column from {listed}, or mend the export that lost its values",
                )

    def _labels(self, values: pl.Series) -> np.ndarray:
        labels, task = values.cast(pl.Float64), values.name in self.spec.tasks
        if labels.null_count() and not task:
            row = int(labels.is_null().arg_true()[0])
            self._fail(values.name, row, "the label is null", "drop the row, or write 0 or 1")
        number = labels.to_numpy()  # null becomes NaN
        wrong = (number != 0) & (number != 1)
        if task:
            wrong &= ~np.isnan(number)
        if wrong.any():
            row = int(np.flatnonzero(wrong)[0])
            remedy = "write 0, 1, or null where it is not known" if task else "a click is 1 and no click is 0"
            self._fail(values.name, row, f"the label is {values[row]}", remedy)
        return number.astype(np.float32)

    def _fail(self, column: str, row: int, problem: str, remedy: str) -> None:
        raise DataError(
            problem, where=f"{self.source}: column {column}, row {self.rows + row + 1:,}", remedy=remedy
        )
