"""What a model sees, and the columnar rows from which it is cut."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from ctr_models.schema import Schema


@dataclass
class Batch(Pipelineable):
    """B rows, ready for a model.

    Args:
        dense: numbers, (B, N) float32, columns in the order of ``schema.dense``.
        sparse: int32 ids of all categorical and multi fields, keys in the order of ``schema.sparse``.
        sequences: int32 ids of the behaviour histories, oldest first, keys as in ``schema.sequences``.
        label: 0 or 1, (B,) float32.
        group: the user, for per-user metrics, (B,) int64.
        targets: labels of the further tasks, (B, T) float32, columns in the order of ``schema.tasks``; NaN where
            unknown. None where there are no further tasks, or no row's label is known.
    """

    dense: Tensor
    sparse: KeyedJaggedTensor
    sequences: KeyedJaggedTensor
    label: Tensor
    group: Tensor
    targets: Tensor | None = None

    def __len__(self) -> int:
        return self.label.shape[0]

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
        """Return the batch on ``device``."""
        return Batch(**{name: one.to(device, non_blocking=non_blocking) for name, one in self._held()})

    def record_stream(self, stream: torch.Stream) -> None:
        """Tell the allocator that ``stream`` uses these tensors."""
        for _, one in self._held():
            one.record_stream(stream)

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory."""
        return Batch(**{name: one.pin_memory() for name, one in self._held()})

    def _held(self) -> Iterator[tuple[str, Any]]:
        """What the batch has, by the name of its field."""
        for f in fields(self):
            one = getattr(self, f.name)
            if one is not None:
                yield f.name, one


@lru_cache(maxsize=8)
def _one_each(rows: int) -> tuple[Tensor, Tensor]:
    """Return the lengths and offsets of rows that hold one id each, to be shared and never written to.

    By numpy: torch would fill them with OpenMP threads of the calling thread's own, and a second team of those,
    the loader's, slows down the trainer's by a tenth.
    """
    return torch.from_numpy(np.ones(rows, np.int32)), torch.from_numpy(np.arange(rows + 1, dtype=np.int32))


@dataclass(frozen=True)
class Ragged:
    """Several ids a row: the ids of row i are ``values[offsets[i]:offsets[i + 1]]``."""

    values: np.ndarray  # (total,) int32
    offsets: np.ndarray  # (W + 1,) int64

    @classmethod
    def concat(cls, parts: Sequence[Ragged]) -> Ragged:
        """Put the rows of several one after the other."""
        begins = np.cumsum([0, *(p.offsets[-1] for p in parts)])
        offsets = [p.offsets[1:] + begin for p, begin in zip(parts, begins[:-1], strict=True)]
        values = np.concatenate([p.values[: p.offsets[-1]] for p in parts])
        return cls(values, np.concatenate([np.zeros(1, dtype=np.int64), *offsets]))

    def take(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return ids and lengths (int32) of the chosen rows, in their order."""
        starts = self.offsets[rows]
        lengths = self.offsets[rows + 1] - starts
        ends = np.cumsum(lengths)
        total = int(ends[-1]) if len(ends) else 0
        # Position of each value inside its own row, then shifted to where that row starts.
        source = np.arange(total, dtype=np.int64) + np.repeat(starts - (ends - lengths), lengths)
        return self.values[source], lengths.astype(np.int32)


@dataclass(frozen=True)
class EncodedRows:
    """W encoded rows as columns: the loader's window, a scoring request, or a whole small file.

    Args:
        schema: the fields and their order.
        dense: (W, N) float32.
        single: ids of the categorical fields, (S, W) int32, in the order in which they stand in
            ``schema.sparse``.
        ragged: ids of multi and sequence fields by name.
        label: (W,) float32.
        group: (W,) int64.
        targets: (W, T) float32, columns in the order of ``schema.tasks``, NaN where unknown; None: no label known.
    """

    schema: Schema
    dense: np.ndarray
    single: np.ndarray
    ragged: Mapping[str, Ragged]
    label: np.ndarray
    group: np.ndarray
    targets: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.label)

    @classmethod
    def concat(cls, parts: Sequence[EncodedRows]) -> EncodedRows:
        """Put rows of one schema one after the other; labels of further tasks are left out.

        Args:
            parts: at least one.

        Example:
            >>> from ctr_models import Schema, example_rows
            >>> rows = example_rows(Schema.of({"user": 10}), rows=3)
            >>> len(EncodedRows.concat([rows, rows]))
            6
        """
        first = parts[0]
        if len(parts) == 1:
            return first
        return cls(
            schema=first.schema,
            dense=np.concatenate([p.dense for p in parts]),
            single=np.concatenate([p.single for p in parts], axis=1),
            ragged={name: Ragged.concat([p.ragged[name] for p in parts]) for name in first.ragged},
            label=np.concatenate([p.label for p in parts]),
            group=np.concatenate([p.group for p in parts]),
        )

    def batch(self, rows: np.ndarray | slice | None = None) -> Batch:
        """Cut a Batch from the chosen rows (all of them by default), without a Python object a value."""
        if rows is None:
            rows = slice(0, len(self))
        if isinstance(rows, slice):
            single, dense = np.ascontiguousarray(self.single[:, rows]), np.ascontiguousarray(self.dense[rows])
        else:  # take is several times faster than indexing by an array
            single, dense = self.single.take(rows, axis=1), self.dense.take(rows, axis=0)  # (S, B), (B, N)
        size = single.shape[1] if len(single) else len(self.label[rows])
        index = np.arange(len(self), dtype=np.int64)[rows] if self.ragged else None
        return Batch(
            dense=torch.from_numpy(dense),
            sparse=self._keyed([(f.name, f.kind) for f in self.schema.sparse], single, index, size),
            sequences=self._keyed([(f.name, f.kind) for f in self.schema.sequences], single, index, size),
            label=torch.from_numpy(np.ascontiguousarray(self.label[rows])),
            group=torch.from_numpy(np.ascontiguousarray(self.group[rows])),
            targets=None if self.targets is None else torch.from_numpy(np.ascontiguousarray(self.targets[rows])),
        )

    def _keyed(
        self, keys: list[tuple[str, str]], single: np.ndarray, index: np.ndarray | None, size: int
    ) -> KeyedJaggedTensor:
        if not keys:
            empty = torch.empty(0, dtype=torch.int32)
            return KeyedJaggedTensor(keys=[], values=empty, lengths=empty, stride=size)
        names = [name for name, _ in keys]
        if all(kind == "categorical" for _, kind in keys):
            # One id a row for every key: lengths and offsets are known without looking at them.
            lengths_of_one, offsets_of_one = _one_each(len(keys) * size)
            return KeyedJaggedTensor(
                keys=names,
                values=torch.from_numpy(single.reshape(-1)),
                lengths=lengths_of_one,
                offsets=offsets_of_one,
                stride=size,
                length_per_key=[size] * len(keys),
                offset_per_key=[i * size for i in range(len(keys) + 1)],
            )
        values, lengths, per_key, position = [], [], [], 0
        ones = np.ones(size, dtype=np.int32)
        for name, kind in keys:
            if kind == "categorical":
                values.append(single[position])
                lengths.append(ones)
                position += 1
            else:
                assert index is not None
                ids, counts = self.ragged[name].take(index)
                values.append(ids)
                lengths.append(counts)
            per_key.append(len(values[-1]))
        return KeyedJaggedTensor(
            keys=names,
            values=torch.from_numpy(np.concatenate(values)),
            lengths=torch.from_numpy(np.concatenate(lengths)),
            stride=size,
            length_per_key=per_key,
        )
