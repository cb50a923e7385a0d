"""A small encoded data set, written as sluice features writes one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ctr_models.schema import DenseField, IdField, Schema

USERS, ITEMS = 40, 60


@dataclass(frozen=True)
class World:
    """Stands in for EncodedData where no raw data are needed."""

    path: Path
    schema: Schema
    truth: str | None = None

    @property
    def state(self) -> Any:
        counts = {"user": np.full(USERS, 9), "item": np.full(ITEMS, 7), "tags": np.full(12, 5)}
        return SimpleNamespace(hash="0123456789ab", counts=lambda table: counts[table])

    def files(self, split: str) -> list[Path]:
        return sorted((self.path / split).glob("*.parquet"))

    def rows(self, split: str) -> int:
        return sum(pq.read_metadata(f).num_rows for f in self.files(split))


def make_world(
    path: Path, *, rows: int = 1200, dim: int = 8, sequences: bool = False, group: int = 100, seed: int = 3
) -> World:
    """Clicks that depend on user and item, so that a model can learn something."""
    schema = Schema(
        dense=(DenseField(name="price", dim=dim),),
        sparse=(
            IdField(name="user", rows=USERS, dim=dim, role="user"),
            IdField(name="item", rows=ITEMS, dim=dim, role="item"),
            IdField(name="tags", rows=12, dim=dim, kind="multi", max_length=3),
        ),
        sequences=(
            (IdField(name="history", rows=ITEMS, dim=dim, kind="sequence", table="item", target="item", max_length=5),)
            if sequences
            else ()
        ),
    )
    random = np.random.default_rng(seed)
    user_taste, item_taste = random.normal(size=(USERS, 3)), random.normal(size=(ITEMS, 3))
    start = 0
    for split, count in (("train", rows), ("valid", rows // 4), ("test", rows // 4)):
        user, item = random.integers(0, USERS, count), random.integers(0, ITEMS, count)
        logit = (user_taste[user] * item_taste[item]).sum(1)
        label = random.random(count) < 1 / (1 + np.exp(-logit))
        columns = {
            "price": pa.array(random.normal(size=count).astype("f4")),
            "user": pa.array(user.astype("i4")),
            "item": pa.array(item.astype("i4")),
            "tags": _lists(random, count, 12, 3),
            "__label__": pa.array(label.astype("f4")),
            "__user__": pa.array(user.astype("i8")),
            "__row__": pa.array(np.arange(start, start + count)),
        }
        if sequences:
            columns["history"] = _lists(random, count, ITEMS, 5)
        start += count
        table = pa.table(columns)
        half = count // 2 + 7
        (path / split).mkdir(parents=True)
        for number, piece in enumerate((table.slice(0, half), table.slice(half))):
            pq.write_table(piece, path / split / f"part-{number:05d}.parquet", row_group_size=group)
    return World(path, schema)


def _lists(random: np.random.Generator, count: int, rows: int, longest: int) -> pa.Array:
    lengths = random.integers(0, longest + 1, count)
    values = random.integers(0, rows, lengths.sum()).astype("i4")
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype("i4")
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))
