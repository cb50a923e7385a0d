"""Scoring files with a Bundle, in chunks, so that the file need not fit into memory."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq

from ctr_models.errors import DataError
from pipelines.datasets.csv import sniff_separator
from pipelines.datasets.files import need_path, reading, scan_csv, scan_parquet
from pipelines.evaluation.metrics import evaluate
from pipelines.release.bundle import SCORE, Bundle

CHUNK_ROWS = 200_000


@dataclass(frozen=True)
class FileScores:
    """What became of a file.

    Args:
        rows: scored.
        out: where the scores are.
        metrics: auc and others, if the file holds labels of both classes.
    """

    rows: int
    out: Path
    metrics: dict[str, float] = field(default_factory=dict)


def score_file(
    bundle: Bundle,
    data: Path,
    out: Path,
    *,
    chunk_rows: int = CHUNK_ROWS,
    on_chunk: Callable[[int], None] = lambda rows: None,
) -> FileScores:
    """Score a Parquet or CSV file and write the scores, whole or not at all.

    Written are ``row`` (number in the file), the user, item, timestamp and label columns that the file has, and
    ``score``. Histories that the spec makes from the log are made from the whole file, which is then held in
    memory, unless it has them as list columns.

    Args:
        bundle: to score with.
        data: ``.parquet``, or delimited text with a header.
        out: the Parquet or CSV file to write, by its suffix.
        chunk_rows: rows held at once.
        on_chunk: called with the number of rows after each chunk.

    Raises:
        DataError: the file can't be read or lacks columns.
    """
    if out.suffix not in (".parquet", ".csv") or out.is_dir():
        raise DataError("scores are written into one file", where=str(out), remedy="let it end in .parquet or .csv")
    need_path(data, looked_for="a .parquet or .csv file of raw rows")
    if data.is_dir():
        raise DataError("this is a folder", where=str(data), remedy="give one .parquet or .csv file of raw rows")
    if out.exists() and out.samefile(data):
        raise DataError("the scores would replace the rows", where=str(out), remedy="give another --out")
    frame = _scan(bundle, data)
    columns = frame.collect_schema().names()
    spec = bundle.state.spec
    read = {c.column for c in spec.direct} | set(spec.request_columns)
    if read.isdisjoint(columns):
        raise DataError(
            "holds none of the model's columns",
            where=str(data),
            remedy=f"it reads {', '.join(spec.request_columns)}",
        )
    kept = [c for c in dict.fromkeys((spec.user, spec.item, spec.timestamp, spec.label)) if c and c in columns]
    whole = any(c.from_log and c.name not in columns for c in spec.columns)
    labels, scores, rows = [], [], 0
    with _ScoreWriter(out) as writer:
        for chunk in _chunks(frame, data, None if whole else chunk_rows):
            values = bundle.score_frame(chunk, source=str(data))
            if spec.label in columns:
                labels.append(chunk[spec.label].cast(pl.Float32, strict=False).to_numpy())
                scores.append(values)
            index = pl.int_range(rows, rows + len(chunk), dtype=pl.Int64, eager=True).alias("row")
            writer.write(chunk.select(index, *kept).with_columns(pl.Series("score", values)))
            rows += len(chunk)
            on_chunk(len(chunk))
    if not rows:
        raise DataError("no rows to score", where=str(data))
    return FileScores(rows, out, _metrics(labels, scores))


def file_rows(data: Path) -> int | None:
    """Return the number of rows where the file tells it at once (Parquet), for a progress bar."""
    if data.suffix != ".parquet" or not data.is_file():
        return None
    with reading(data):
        return pl.scan_parquet(data).select(pl.len()).collect().item()


def _scan(bundle: Bundle, data: Path) -> pl.LazyFrame:
    if data.suffix == ".parquet":
        return scan_parquet([data])
    separator = sniff_separator(data)
    with reading(data):
        header = pl.read_csv(data, separator=separator, n_rows=0).columns
    # The rows that trained the model know the types better than the first rows of this file.
    known = bundle.golden.drop(SCORE).schema
    overrides = {n: t for n, t in known.items() if n in header and not t.is_nested() and t != pl.Null}
    return scan_csv(
        [data],
        separator=separator,
        schema_overrides=overrides,
        try_parse_dates=True,
        infer_schema_length=10_000,
    )


def _chunks(frame: pl.LazyFrame, data: Path, rows: int | None) -> Iterator[pl.DataFrame]:
    with reading(data):
        if rows is None:
            yield frame.collect()
            return
        batches = frame.collect_batches(chunk_size=rows, maintain_order=True, engine="streaming")
    while True:
        with reading(data):
            chunk = next(batches, None)
        if chunk is None:
            return
        if len(chunk):
            yield chunk


class _ScoreWriter:
    """Writes chunks beside ``out`` and renames when all is well; a CSV is converted at the end."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self._writer: pq.ParquetWriter | None = None

    def __enter__(self) -> _ScoreWriter:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self._folder = tempfile.TemporaryDirectory(prefix=f".{self.out.name}.", dir=self.out.parent)
        self._path = Path(self._folder.name) / "scores.parquet"
        return self

    def write(self, chunk: pl.DataFrame) -> None:
        """Append a chunk."""
        table = chunk.to_arrow()
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._path, table.schema, compression="zstd")
        self._writer.write_table(table.cast(self._writer.schema))

    def __exit__(self, kind: object, *_: object) -> None:
        with self._folder:
            if self._writer is not None:
                self._writer.close()
            if kind is None and self._writer is not None:
                done = self._path
                if self.out.suffix == ".csv":
                    done = self._path.with_suffix(".csv")
                    pl.scan_parquet(self._path).sink_csv(done)
                with open(done, "rb") as file:
                    os.fsync(file.fileno())
                done.replace(self.out)


def _metrics(labels: list[np.ndarray], scores: list[np.ndarray]) -> dict[str, float]:
    if not labels:
        return {}
    label, score = np.concatenate(labels), np.concatenate(scores)
    known = np.isin(label, (0.0, 1.0))
    if len(np.unique(label[known])) < 2:
        return {}
    return evaluate(label[known], score[known])
