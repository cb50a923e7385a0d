"""Batches from encoded Parquet: read, shuffled and cut in a thread of their own."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ctr_models.batch import Batch, EncodedRows
from ctr_models.errors import ConfigError, DataError
from ctr_models.schema import Schema
from pipelines.features.spec import LABEL, task_label
from pipelines.features.transform import USER, encoded_rows

PREFETCH = 8
"""Batches that wait for the trainer; they cover the time in which the next window is read."""


class Loader:
    """One epoch of Batches, the same for the same arguments on every machine.

    Row groups come in an order drawn from ``(seed, epoch)``. That sequence of N rows is dealt into ``parts``
    stretches whose lengths differ by one row at most. Inside each part, windows of ``window_rows / parts``
    rows are shuffled, and a step takes ``batch_size / parts`` rows of every part, one part after the other.
    A rank reads ``parts / world`` parts, so what a step sees does not depend on the number of ranks. A part
    that is one row short begins again from its start; :attr:`rows` says how many rows are real.

    Args:
        files: encoded Parquet files of one split.
        schema: the inputs of the model.
        batch_size: rows a step over all ranks, a multiple of ``parts``.
        seed: of the shuffle.
        epoch: changes the shuffle.
        shuffle: False keeps the order of the files, and of a last single row too.
        parts: stretches into which the rows are dealt, a multiple of ``world``.
        rank: of this process.
        world: number of processes.
        window_rows: rows that are shuffled together, over all parts.
        start_step: steps to pass over, without reading them.
        pin: put batches into page-locked memory, for a CUDA device.

    Raises:
        DataError: a file can't be read, or the rows are fewer than the parts.
        ConfigError: batch size, parts and ranks don't divide.
    """

    def __init__(
        self,
        files: Sequence[Path],
        schema: Schema,
        *,
        batch_size: int,
        seed: int = 0,
        epoch: int = 0,
        shuffle: bool = False,
        parts: int = 1,
        rank: int = 0,
        world: int = 1,
        window_rows: int = 1_000_000,
        start_step: int = 0,
        pin: bool = False,
    ) -> None:
        if parts % world:
            raise ConfigError(
                f"{parts} parts can't be shared by {world} ranks",
                where="train.parts",
                remedy=f"use a multiple of {world}",
            )
        if batch_size % parts:
            raise ConfigError(
                f"a batch of {batch_size} rows can't be dealt into {parts} parts",
                where="train.batch_size",
                remedy=f"use a multiple of {parts}",
            )
        self.schema, self.shuffle, self.pin = schema, shuffle, pin
        self._seed, self._epoch, self._start = seed, epoch, start_step
        self._mine = range(rank * parts // world, (rank + 1) * parts // world)
        self._batch = batch_size // parts  # rows a step of one part
        self._columns = [*(f.name for f in schema.fields), LABEL, *map(task_label, schema.tasks), USER]
        groups = [(file, i, rows) for file in files for i, rows in enumerate(_row_groups(file))]
        if shuffle:
            order = self._random().permutation(len(groups))
            groups = [groups[i] for i in order]
        self._groups = groups
        self._ends = np.cumsum([rows for *_, rows in groups], dtype=np.int64)
        total = int(self._ends[-1]) if groups else 0
        if total < parts:
            where = str(files[0].parent) if files else ""
            raise DataError(f"{total} rows for {parts} parts", where=where, remedy="give more rows or fewer parts")
        self._cuts = [p * total // parts for p in range(parts + 1)]
        length = max(b - a for a, b in zip(self._cuts, self._cuts[1:], strict=False))  # rows of the longest part
        if shuffle and length % self._batch == 1 and length > 1:
            length -= 1  # batch normalisation can't learn from one row
        self._length = length
        self._window = max(1, window_rows // parts // self._batch) * self._batch
        self.steps = -(-length // self._batch)
        """Steps of the whole epoch."""
        self.rows = sum(self._cuts[p + 1] - self._cuts[p] for p in self._mine)
        """Rows of this rank's parts, none counted twice."""
        self.waited = 0.0
        """Seconds for which the consumer waited."""
        self.worked = 0.0
        """CPU seconds of the loader's thread."""
        self._open: tuple[int, pa.Table] | None = None
        self._ready: queue.Queue | None = None
        self._over = threading.Event()

    def __len__(self) -> int:
        """Return the steps that iteration yields."""
        return max(0, self.steps - self._start)

    def __iter__(self) -> Iterator[Batch]:
        ready: queue.Queue[Batch | BaseException | None] = queue.Queue(PREFETCH)
        stop = threading.Event()
        self._ready, self._over = ready, threading.Event()
        thread = threading.Thread(target=self._work, args=(ready, stop), name="sluice-loader", daemon=True)
        thread.start()
        try:
            while True:
                begin = time.perf_counter()
                item = ready.get()
                self.waited += time.perf_counter() - begin
                if item is None:
                    return
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()
            thread.join()

    def _work(self, ready: queue.Queue, stop: threading.Event) -> None:
        begin = time.thread_time()
        try:
            for batch in self._batches():
                self.worked += time.thread_time() - begin
                if not _put(ready, batch, stop):
                    return
                begin = time.thread_time()
            _put(ready, None, stop)
        except BaseException as error:  # the consumer raises it
            _put(ready, error, stop)
        finally:
            self._open = None
            self._over.set()

    def settle(self) -> None:
        """Wait until the thread has prepared all that it may; benchmarks charge it to whoever used it up."""
        while self._ready is not None and not self._ready.full() and not self._over.is_set():
            time.sleep(0.0005)

    def _batches(self) -> Iterator[Batch]:
        step = self._start
        per_window = self._window // self._batch
        while step < self.steps:
            number = step // per_window
            begin = number * self._window
            end = min(begin + self._window, self._length)
            rows, order = self._read_window(number, begin, end)
            while step < min((number + 1) * per_window, self.steps):
                at = step * self._batch - begin
                batch = rows.batch(order[:, at : at + self._batch].reshape(-1))
                yield batch.pin_memory() if self.pin else batch
                step += 1

    def _read_window(self, number: int, begin: int, end: int) -> tuple[EncodedRows, np.ndarray]:
        """Rows ``begin`` to ``end`` of each of this rank's parts, and the order in which to take them."""
        size = end - begin
        order = np.empty((len(self._mine), size), dtype=np.int64)
        tables = []
        for i, part in enumerate(self._mine):
            first, rows = self._cuts[part], self._cuts[part + 1] - self._cuts[part]
            tables += self._read(first + begin, first + min(end, rows))
            if end > rows:  # one row short of the longest part
                tables += self._read(first, first + end - rows)
            order[i] = self._random(part, number).permutation(size) if self.shuffle else np.arange(size)
            order[i] += i * size
        return encoded_rows(pa.concat_tables(tables), self.schema), order

    def _read(self, begin: int, end: int) -> list[pa.Table]:
        """Rows ``begin`` to ``end`` of the epoch's sequence of row groups."""
        tables = []
        group = int(np.searchsorted(self._ends, begin, side="right"))
        while begin < end:
            first = int(self._ends[group]) - self._groups[group][2]
            stop = min(end, int(self._ends[group]))
            tables.append(self._group(group).slice(begin - first, stop - begin))
            begin, group = stop, group + 1
        return tables

    def _group(self, group: int) -> pa.Table:
        if self._open is None or self._open[0] != group:
            file, index, _ = self._groups[group]
            self._open = None
            try:
                with pq.ParquetFile(file) as parquet:
                    table = parquet.read_row_group(index, columns=self._columns, use_threads=False)
            except (OSError, pa.ArrowException) as error:
                raise _unreadable(file, error) from None
            absent = [c for c in self._columns if c not in table.column_names]
            if absent:
                raise DataError(f"column {absent[0]!r} is missing", where=str(file), remedy=_AGAIN)
            self._open = group, table
        return self._open[1]

    def _random(self, *path: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64([self._seed, self._epoch, *path]))


_AGAIN = "delete the folder of encoded features and run sluice features again"


def _unreadable(file: Path, error: Exception) -> DataError:
    reason = " ".join(str(error).split())
    return DataError(f"can't be read as Parquet ({reason})", where=str(file), remedy=_AGAIN)


def _row_groups(file: Path) -> list[int]:
    try:
        with pq.ParquetFile(file) as parquet:
            meta = parquet.metadata
            return [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(file, error) from None


def _put(ready: queue.Queue, item: object, stop: threading.Event) -> bool:
    while not stop.is_set():
        try:
            ready.put(item, timeout=0.1)
            return True
        except queue.Full:
            continue
    return False
