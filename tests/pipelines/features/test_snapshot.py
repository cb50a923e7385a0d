"""The embedded store: whole or absent, checked when it is opened, found by hash."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from ctr_models.errors import ArtifactError
from pipelines.features import snapshot as module
from pipelines.features.snapshot import MANIFEST, Snapshot, write_snapshot
from pipelines.features.stored import HASH, KEY, Entity, Features, Rows, Stored, key_hash

STORED = Stored(
    user=Entity(key="u", type="text", columns=("city",)),
    item=Entity(key="ad", type="integer", columns=("price", "tags")),
    histories={},
)


def features(n: int = 500, *, price: float = 0.0, hashes: np.ndarray | None = None) -> Features:
    def rows(ids: list[str], columns: dict[str, Any]) -> Rows:
        frame = pl.DataFrame({KEY: ids, **columns})
        found = key_hash(ids) if hashes is None else hashes
        return Rows(frame.with_columns(pl.Series(HASH, found)).sort(HASH), {})

    ids = [str(i) for i in range(n)]
    tags = pl.Series([["a"] * (i % 3) if i % 5 else None for i in range(n)], dtype=pl.List(pl.String))
    return Features(
        STORED,
        rows([f"ü{i}" for i in ids], {"city": [None if i % 7 == 0 else f"c{i}" for i in range(n)]}),
        rows(ids, {"price": [price + i for i in range(n)], "tags": tags}),
        "7",
        "print",
    )


def test_what_was_written_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rows.pieces, "__defaults__", (64,))  # several batches
    told: list[int] = []
    manifest = write_snapshot(features(), tmp_path / "online", on_rows=told.append)
    assert sum(told) == 1000 and len(told) > 10
    snapshot = Snapshot.open(tmp_path / "online")
    assert snapshot.stored == STORED
    assert manifest["rows"] == {"users": 500, "items": 500}
    ids = [str(i) for i in (3, 499, 10, 3, 777, 0)]
    assert snapshot.find("items", ids) == [
        {"price": 3.0, "tags": []},
        {"price": 499.0, "tags": ["a"]},
        {"price": 10.0},
        {"price": 3.0, "tags": []},
        None,
        {"price": 0.0},
    ]
    assert snapshot.find("users", ["ü7", "ü8", "7"]) == [{}, {"city": "c8"}, None]
    assert snapshot.find("items", []) == []
    every = snapshot.find("users", [f"ü{i}" for i in range(500)])
    assert None not in every


def test_ids_that_share_a_hash_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def coarse(ids: Any) -> np.ndarray:
        return np.array([int(one.strip("ü")) // 10 if len(one) < 9 else 2**63 for one in ids], dtype=np.uint64)

    monkeypatch.setattr(Rows.pieces, "__defaults__", (4,))
    monkeypatch.setattr(module, "key_hash", coarse)
    write_snapshot(features(100, hashes=coarse([str(i) for i in range(100)])), tmp_path / "online")
    snapshot = Snapshot.open(tmp_path / "online")
    found = snapshot.find("items", [str(i) for i in range(0, 110)])
    assert [one and one["price"] for one in found] == [*map(float, range(100)), *[None] * 10]
    assert snapshot.find("items", ["x" * 9]) == [None]


def test_the_same_features_give_the_same_bytes(tmp_path: Path) -> None:
    one = write_snapshot(features(), tmp_path / "one")
    assert one == write_snapshot(features(), tmp_path / "two")
    assert one["hash"] != write_snapshot(features(price=1), tmp_path / "three")["hash"]


def test_a_snapshot_of_nobody(tmp_path: Path) -> None:
    write_snapshot(features(0), tmp_path / "online")
    assert Snapshot.open(tmp_path / "online").find("users", ["ü1"]) == [None]


def test_an_opened_one_outlives_its_folder(tmp_path: Path) -> None:
    write_snapshot(features(), tmp_path / "online")
    old = Snapshot.open(tmp_path / "online")
    write_snapshot(features(price=0.5), tmp_path / "online")
    new = Snapshot.open(tmp_path / "online")
    assert old.find("items", ["4"]) == [{"price": 4.0, "tags": ["a"]}]
    assert new.find("items", ["4"]) == [{"price": 4.5, "tags": ["a"]}]
    assert old.version != new.version


@pytest.mark.parametrize("name", ["users.arrow", "items.arrow", MANIFEST])
@pytest.mark.parametrize("how", ["flip", "cut", "empty", "gone"])
def test_damage_is_refused_by_name(tmp_path: Path, name: str, how: str) -> None:
    write_snapshot(features(), tmp_path / "online")
    file = tmp_path / "online" / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    if how == "gone":
        file.unlink()
    else:
        file.write_bytes({"flip": bytes(content), "cut": bytes(content[:-9]), "empty": b""}[how])
    with pytest.raises(ArtifactError, match=name):
        Snapshot.open(tmp_path / "online")


def test_another_format_is_refused(tmp_path: Path) -> None:
    write_snapshot(features(), tmp_path / "online")
    file = tmp_path / "online" / MANIFEST
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 99}))
    with pytest.raises(ArtifactError, match="format 99"):
        Snapshot.open(tmp_path / "online")


def test_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="sluice materialize writes one"):
        Snapshot.open(tmp_path / "none")
