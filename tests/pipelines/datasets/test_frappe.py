"""Frappe as papers split it, and as it was published."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from ctr_models.errors import DataError
from pipelines.datasets.base import RawData, open_data
from pipelines.datasets.config import DataConfig
from pipelines.datasets.frappe import FIELDS

ROW = dict(
    zip(FIELDS, ("1", "007", "sunset", "monday", "weekend", "home", "free", "sunny", "Spain", "0"), strict=True)
)


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_the_split_of_the_papers(tmp_path: Path, suffix: str) -> None:
    frame = pl.DataFrame([{"label": 1, **ROW}])
    for part in ("train", "valid", "test"):
        (frame.write_parquet if suffix == ".parquet" else frame.write_csv)(tmp_path / f"{part}{suffix}")
    data = open_data(DataConfig(source="frappe", path=tmp_path))
    assert data.split.by == "given"
    assert data.parts["test"].frame.collect().row(0) == (1, *ROW.values())
    assert data.spec is not None
    assert (data.spec.dim, data.spec.user, data.spec.item) == (10, "user", "item")
    assert [c.role for c in data.spec.columns[:3]] == ["user", "item", "context"]


def _original(folder: Path, **options: int) -> RawData:
    lines = ["\t".join(["user", "item", "cnt", *FIELDS[2:]])]
    lines += [
        "\t".join([str(u), str(10 * u + i), "3", *list(ROW.values())[2:]]) for u in range(5) for i in range(4)
    ]
    (folder / "frappe.csv").write_text("\n".join(lines) + "\n")
    return open_data(DataConfig(source="frappe", path=folder, options=options))


def test_the_original_gets_negatives_that_the_user_never_used(tmp_path: Path) -> None:
    data = _original(tmp_path, negatives=3)
    frame = data.parts["all"].frame.collect()
    assert frame["label"].value_counts().sort("label").rows() == [(0, 60), (1, 20)]
    used = set(frame.filter(pl.col("label") == 1).select("user", "item").rows())
    assert not used & set(frame.filter(pl.col("label") == 0).select("user", "item").rows())
    assert frame.equals(_original(tmp_path, negatives=3).parts["all"].frame.collect())
    assert not frame.equals(_original(tmp_path, negatives=3, seed=1).parts["all"].frame.collect())
    assert (data.split.train, data.split.valid) == (0.7, 0.2)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"and for frappe.csv, found none. .*Frappe_x1"):
        open_data(DataConfig(source="frappe", path=tmp_path))
    for part in ("train", "valid", "test"):
        pl.DataFrame([{"label": 1, **ROW}]).drop("city").write_parquet(tmp_path / f"{part}.parquet")
    with pytest.raises(DataError, match=r"train.parquet: columns city are missing"):
        open_data(DataConfig(source="frappe", path=tmp_path))


@pytest.mark.data
def test_the_real_split(data_root: Path) -> None:
    data = open_data(DataConfig(source="frappe", path=data_root / "frappe"))
    rows = {name: part.frame.collect().height for name, part in data.parts.items()}
    assert rows == {"train": 202_027, "valid": 57_722, "test": 28_860}
