"""A small encoded data set, written as sluice features writes one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from ctr_models.schema import DenseField, IdField, Schema
from pipelines.config import RunConfig, parse_config

USERS, ITEMS, TAGS = 40, 60, 12


@dataclass(frozen=True)
class World:
    """Stands in for EncodedData: training needs no raw data."""

    path: Path
    schema: Schema
    truth: str | None = None

    @property
    def state(self) -> Any:
        counts = {"user": np.full(USERS, 9), "item": np.full(ITEMS, 7), "tags": np.full(TAGS, 5)}
        return SimpleNamespace(hash="0123456789ab", counts=lambda table: counts[table])

    def files(self, split: str) -> list[Path]:
        return sorted((self.path / split).glob("*.parquet"))

    def rows(self, split: str) -> int:
        return sum(pq.read_metadata(file).num_rows for file in self.files(split))


def make_schema(*, dim: int = 8, sequences: bool = False) -> Schema:
    """Numeric, categorical and multi fields, and a history that shares the items' table."""
    history = IdField(
        name="history", rows=ITEMS, dim=dim, kind="sequence", table="item", target="item", max_length=5
    )
    return Schema(
        dense=(DenseField(name="price", dim=dim),),
        sparse=(
            IdField(name="user", rows=USERS, dim=dim, role="user"),
            IdField(name="item", rows=ITEMS, dim=dim, role="item"),
            IdField(name="tags", rows=TAGS, dim=dim, kind="multi", max_length=3),
        ),
        sequences=(history,) if sequences else (),
    )


def make_world(
    path: Path, *, rows: int = 600, sequences: bool = False, tasks: bool = False, group: int = 100
) -> World:
    """Clicks that depend on user and item, so that a model can learn something; two files, ragged row groups.

    With ``tasks``, a click may be followed by a conversion, which depends on the item.
    """
    random, later = np.random.default_rng(3), np.random.default_rng(4)
    user_taste, item_taste = random.normal(size=USERS), random.normal(size=ITEMS)
    start = 0
    for split, count in (("train", rows), ("valid", rows // 3), ("test", rows // 3)):
        user, item = random.integers(0, USERS, count), random.integers(0, ITEMS, count)
        chance = 1 / (1 + np.exp(-2 * (user_taste[user] + item_taste[item])))
        columns = {
            "price": pa.array(random.normal(size=count).astype("f4")),
            "user": pa.array(user.astype("i4")),
            "item": pa.array(item.astype("i4")),
            "tags": _lists(random, count, TAGS, 3),
            "history": _lists(random, count, ITEMS, 5),
            "__label__": pa.array((random.random(count) < chance).astype("f4")),
            "__user__": pa.array(user.astype("i8")),
            "__row__": pa.array(np.arange(start, start + count)),
        }
        start += count
        if tasks:
            bought = later.random(count) < 1 / (1 + np.exp(-2 * item_taste[item]))
            columns["__label_conversion__"] = np.where(columns["__label__"].to_numpy() == 1, bought, np.nan).astype(
                "f4"
            )
        table = pa.table(columns)
        half = count // 2 + 7
        (path / split).mkdir(parents=True)
        for number, piece in enumerate((table.slice(0, half), table.slice(half))):
            pq.write_table(piece, path / split / f"part-{number:05d}.parquet", row_group_size=group)
    schema = make_schema(sequences=sequences)
    return World(path, schema.model_copy(update={"tasks": ("conversion",)}) if tasks else schema)


def make_config(workdir: Path, **train: Any) -> RunConfig:
    """A small model on small batches, without MLflow."""
    settings = {"epochs": 2, "batch_size": 50, "embedding": {"lr": 0.1}, **train}
    model = {"name": "dnn", "embedding_std": 0.1, "mlp": {"hidden": [16], "dropout": 0.2, "batch_norm": True}}
    return parse_config(
        {"workdir": str(workdir), "model": model, "train": settings, "tracking": {"enabled": False}}
    )


def _lists(random: np.random.Generator, count: int, rows: int, longest: int) -> pa.Array:
    lengths = random.integers(0, longest + 1, count)
    values = random.integers(0, rows, lengths.sum()).astype("i4")
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype("i4")
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Numeric, categorical and multi fields."""
    return make_world(tmp_path_factory.mktemp("world") / "encoded")


@pytest.fixture(scope="session")
def history_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """The same with a behaviour history that shares the items' table."""
    return make_world(tmp_path_factory.mktemp("history") / "encoded", sequences=True)


@pytest.fixture(scope="session")
def task_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """The same with conversions, known only after a click."""
    return make_world(tmp_path_factory.mktemp("tasks") / "encoded", tasks=True)


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., RunConfig]:
    """Make a configuration from settings of ``train``."""
    return lambda **train: make_config(tmp_path, **train)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
