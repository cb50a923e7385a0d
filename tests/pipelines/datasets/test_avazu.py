"""Avazu's training log: hour, weekday and weekend come out of YYMMDDHH."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import pytest

from ctr_models.errors import DataError
from pipelines.datasets.avazu import FIELDS
from pipelines.datasets.base import open_data
from pipelines.datasets.config import DataConfig

HEADER = ",".join(["id", "click", "hour", *FIELDS])
VALUES = ",".join(["1005", "0", *["07"] * (len(FIELDS) - 2)])


def test_fields_are_derived_and_ids_stay_text(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_text(f"{HEADER}\n1000009418151094273,0,14102100,{VALUES}\n9,1,14102523,{VALUES}\n")
    data = open_data(DataConfig(source="avazu", path=tmp_path))
    frame = data.parts["all"].frame.collect()
    assert frame["time"].to_list() == [datetime(2014, 10, 21, 0), datetime(2014, 10, 25, 23)]
    assert frame.select("click", "hour", "weekday", "weekend").rows() == [(0, 0, 2, 0), (1, 23, 6, 1)]
    assert frame["C21"].to_list() == ["07", "07"]
    assert "id" not in frame.columns
    assert data.spec is not None
    assert len(data.spec.columns) == 24
    assert data.spec.timestamp == "time"
    assert set(data.spec.raw_columns) <= set(frame.columns)
    assert {c.name for c in data.spec.columns if c.role == "user"} == {n for n in FIELDS if n.startswith("device_")}


def test_the_test_file_has_no_clicks(tmp_path: Path) -> None:
    path = tmp_path / "test.csv"
    path.write_text(HEADER.replace("click,", "") + "\n")
    with pytest.raises(DataError, match=r"test.csv: row 1: columns click are missing. the published file is train"):
        open_data(DataConfig(source="avazu", path=path))
