"""Any Parquet: a file, a folder, a pattern, three parts."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from ctr_models.errors import ConfigError
from pipelines.datasets.base import open_data
from pipelines.datasets.config import DataConfig


def test_a_folder_and_a_pattern_are_read_in_order_of_names(tmp_path: Path) -> None:
    for day in (2, 1, 3):
        pl.DataFrame({"day": [day]}).write_parquet(tmp_path / f"day-{day}.parquet")
    data = open_data(DataConfig(source="parquet", path=tmp_path))
    assert data.parts["all"].frame.collect()["day"].to_list() == [1, 2, 3]
    assert (data.split.by, data.spec) == ("time", None)
    two = open_data(DataConfig(source="parquet", path=tmp_path / "day-[23].parquet"))
    assert two.parts["all"].frame.collect()["day"].to_list() == [2, 3]
    assert two.fingerprint != data.fingerprint


def test_three_parts_are_given(tmp_path: Path) -> None:
    for part in ("train", "valid", "test"):
        pl.DataFrame({"part": [part]}).write_parquet(tmp_path / f"{part}.parquet")
    data = open_data(DataConfig(source="parquet", path=tmp_path))
    assert data.split.by == "given"
    assert data.parts["valid"].frame.collect()["part"].to_list() == ["valid"]
    assert data.parts["valid"].path == tmp_path / "valid.parquet"


def test_it_has_no_options(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.options.rows: unknown key"):
        open_data(DataConfig(source="parquet", path=tmp_path, options={"rows": 1}))
