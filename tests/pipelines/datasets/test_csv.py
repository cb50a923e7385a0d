"""Any delimited text: separators, headers, types."""

from __future__ import annotations

import gzip
from datetime import datetime
from pathlib import Path

import polars as pl
import pytest

from ctr_models.errors import DataError
from pipelines.datasets.base import open_data
from pipelines.datasets.config import DataConfig


@pytest.mark.parametrize("separator", [",", "\t", ";", "|"])
def test_the_separator_is_seen(tmp_path: Path, separator: str) -> None:
    path = tmp_path / "a.txt"
    path.write_text(
        separator.join(["click", "city", "at"]) + "\n" + separator.join(["1", "", "2026-01-01 08:00:00"])
    )
    frame = open_data(DataConfig(source="csv", path=path)).parts["all"].frame.collect()
    assert frame.row(0) == (1, None, datetime(2026, 1, 1, 8))


def test_types_and_names_can_be_given(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("1,02460,3\n0,1,x\n")
    options = {"columns": ["click", "zip", "code"], "types": {"zip": "text", "code": "text"}}
    data = open_data(DataConfig(source="csv", path=path, options=options))
    assert data.parts["all"].frame.collect().rows() == [(1, "02460", "3"), (0, "1", "x")]
    with pytest.raises(DataError, match=r"row 1: 3 columns, but option columns names 1. name every column"):
        open_data(DataConfig(source="csv", path=path, options={"columns": ["click"]}))
    with pytest.raises(DataError, match=r"option types names 'zap', which is no column. did you mean 'zip'"):
        open_data(DataConfig(source="csv", path=path, options={**options, "types": {"zap": "text"}}))


def test_parts_and_files_share_one_schema(tmp_path: Path) -> None:
    # By its own first rows valid's code would be a number.
    for part, code in {"train": "x", "valid": "1", "test": "y"}.items():
        (tmp_path / f"{part}.csv").write_text(f"click,code\n1,{code}\n")
    data = open_data(DataConfig(source="csv", path=tmp_path))
    assert {n: p.frame.collect_schema()["code"] for n, p in data.parts.items()} == dict.fromkeys(
        data.parts, pl.String
    )


def test_compressed_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"click,zip\n1,7\n"))
    frame = open_data(DataConfig(source="csv", path=tmp_path)).parts["all"].frame.collect()
    assert frame.rows() == [(1, 7)]
