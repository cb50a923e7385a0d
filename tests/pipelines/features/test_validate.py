"""Bad logs are refused before any work, and the message names file, column, row and remedy."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from ctr_models.errors import ConfigError, DataError
from pipelines.datasets.base import RawData, RawPart
from pipelines.datasets.config import SplitConfig
from pipelines.features.canonical import MAX_TEXT
from pipelines.features.prepare import prepare
from pipelines.features.spec import FeatureSpec
from pipelines.features.validate import time_key

GOOD: dict[str, Any] = {
    "click": [0, 1, 0, 1] * 5,
    "user": ["a", "b"] * 10,
    "time": list(range(20)),
    "ad": ["x", "y", None, "z"] * 5,
    "price": [1.0, 2.0, 3.0, None] * 5,
    "tags": [["p"], []] * 10,
}
SPEC = FeatureSpec.model_validate(
    {
        "label": "click",
        "user": "user",
        "timestamp": "time",
        "columns": [
            {"name": "ad", "kind": "categorical"},
            {"name": "price", "kind": "numeric"},
            {"name": "tags", "kind": "multi"},
        ],
    }
)


def changed(name: str, place: int, value: Any) -> list[Any]:
    values = list(GOOD[name])
    values[place] = value
    return values


def run(tmp_path: Path, frame: pl.LazyFrame, file: Path, split: SplitConfig | None = None) -> None:
    raw = RawData({"all": RawPart(frame, file)}, split or SplitConfig(by="time"), SPEC, "f")
    prepare(raw, None, workdir=tmp_path / "work", seed=1, progress=False)


def test_the_good_log_passes(tmp_path: Path) -> None:
    run(tmp_path, pl.LazyFrame(GOOD), Path("log.parquet"))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"ad": None}, "log.parquet: column ad: no such column. known: 'click', 'price', 'tags', 'time', 'user'."),
        ({"price": None, "prices": GOOD["price"]}, "column price: no such column. did you mean 'prices'?"),
        (
            {"click": ["0", "1"] * 10},
            "column click: the label is String, not a number. write it as 0 and 1, for example by a cast.",
        ),
        ({"click": changed("click", 6, 2)}, "column click, row 7: the label is 2. a click is 1 and no click is 0."),
        ({"click": [0.0] * 6 + [0.5] + [1.0] * 13}, "column click, row 7: the label is 0.5."),
        (
            {"click": changed("click", 19, None)},
            "column click, row 20: the label is null. drop the row, or write 0 or 1.",
        ),
        (
            {"price": [None] * 20},
            "column price: every one of 20 values is null. drop the column from features.columns",
        ),
        ({"ad": pl.Series([None] * 20, dtype=pl.Int64)}, "column ad: every one of 20 values is null."),
        (
            {"tags": ["p"] * 20},
            "column tags: a multi column needs a list, found String. write lists, or name the sep",
        ),
        (
            {"ad": [["x"]] * 20},
            "column ad: a categorical column needs one value a row, found List(String). declare",
        ),
        (
            {"ad": [datetime(2026, 1, 1)] * 20},
            "column ad: Datetime(time_unit='us', time_zone=None) can't be encoded as",
        ),
        ({"ad": [b"x"] * 20}, "column ad: Binary can't be encoded as categorical. cast it to text"),
        ({"ad": [{"a": 1}] * 20}, "can't be encoded as categorical."),
        ({"tags": [[["p"]]] * 20}, "column tags: List(List(String)) can't be encoded as multi."),
        (
            {"price": ["1"] * 19 + ["cheap"]},
            "column price, row 20: expected a number, found 'cheap'. write numbers, or",
        ),
        ({"user": [[1]] * 20}, "column user: the user is List(Int64). write it as text or an integer."),
        (
            {"time": changed("time", 3, None)},
            "column time, row 4: the time is missing. drop the row, or write a number, a date, or text such as",
        ),
        ({"time": ["2026-01-01"] * 12 + ["soon"] * 8}, "column time, row 13: 'soon' is no time."),
        ({"time": [True] * 20}, "column time: Boolean is no time. use a date, a number, or ISO 8601 text."),
        ({"time": [1.0] * 5 + [float("nan")] * 15}, "column time, row 6: the time is missing."),
        (
            {"time": [7] * 20},
            "log.parquet: no row is left for train when split by time. change data.split's shares",
        ),
        (
            {"ad": pl.Series([0] * 19 + [2**63], dtype=pl.UInt64)},
            "column ad, row 20: 9223372036854775808 does not fit a signed 64-bit integer. cast it to text.",
        ),
        (
            {"ad": pl.Series([0] * 19 + [-(2**70)], dtype=pl.Int128)},
            "column ad, row 20: -1180591620717411303424 does not fit a signed 64-bit integer.",
        ),
        (
            {"user": pl.Series([0] * 19 + [2**63], dtype=pl.UInt64)},
            "column user, row 20: 9223372036854775808 does not fit a signed 64-bit integer. cast it to text.",
        ),
        (
            {"user": ["a"] * 5 + ["x" * (MAX_TEXT + 1)] + ["b"] * 14},
            "column user, row 6: text of 65,537 characters; at most 65,536 are taken. cut it, or drop the row.",
        ),
    ],
)
def test_a_bad_log_is_refused(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    log = {name: values for name, values in (GOOD | columns).items() if values is not None}
    with pytest.raises(DataError) as caught:
        run(tmp_path, pl.LazyFrame(log), Path("log.parquet"))
    assert message in str(caught.value)
    assert "log.parquet" in str(caught.value)
    assert list((tmp_path / "work" / "features").iterdir()) == []


def test_a_bad_value_in_a_test_row_is_refused_as_in_a_training_row(tmp_path: Path) -> None:
    """Its table is the other column's, of integers."""
    past = {"name": "past", "kind": "sequence", "table": "ad"}
    spec = FeatureSpec.model_validate(
        {"label": "click", "timestamp": "time", "columns": [{"name": "ad", "kind": "categorical"}, past]}
    )
    for place in (0, 19):
        lists = [["1"]] * 20
        lists[place] = ["x"]
        log = pl.LazyFrame({"click": GOOD["click"], "time": GOOD["time"], "ad": list(range(20)), "past": lists})
        raw = RawData({"all": RawPart(log, Path("log"))}, SplitConfig(by="time"), spec, f"f{place}")
        with pytest.raises(DataError, match="log: column past: expected an integer, found 'x'"):
            prepare(raw, None, workdir=tmp_path, seed=1, progress=False)


def test_a_header_without_rows_is_refused_as_such(tmp_path: Path) -> None:
    """All its columns look like text, the label's too."""
    file = tmp_path / "log.csv"
    file.write_text(",".join(GOOD) + "\n")
    with pytest.raises(DataError, match=r"log\.csv: no rows\. give a file that holds rows"):
        run(tmp_path, pl.scan_csv(file), file)


def test_an_empty_log_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"log\.parquet: no rows\. give a file that holds rows"):
        run(tmp_path, pl.LazyFrame(GOOD).head(0), Path("log.parquet"))


def test_a_truncated_parquet_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "log.parquet"
    pl.DataFrame(GOOD).write_parquet(file)
    whole = file.read_bytes()
    frame = pl.scan_parquet(file)
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError) as caught:
        run(tmp_path, frame, file)
    assert str(caught.value).startswith(f"{file}: can't be read (")
    assert "may be truncated" in str(caught.value)


def csv(tmp_path: Path, text: str) -> tuple[pl.LazyFrame, Path]:
    file = tmp_path / "log.csv"
    file.write_text(text)
    return pl.scan_csv(file, infer_schema_length=2), file


SMALL = FeatureSpec.model_validate({"label": "click", "columns": [{"name": "ad", "kind": "categorical"}]})


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["0,1", "1,2", "0,3,4", "1,5"], "log.csv: row 3: a row has more fields than the header. repair that row"),
        (
            ["0,1", "1,2", "0,three"],
            "log.csv: can't be read (could not parse `three` as dtype `i64` at column 'ad'",
        ),
        (["0,1", "", "1,2"], "log.csv: column click, row 2: the label is null."),
    ],
)
def test_a_bad_csv_is_refused(tmp_path: Path, rows: list[str], message: str) -> None:
    frame, file = csv(tmp_path, "\n".join(["click,ad", *rows]) + "\n")
    raw = RawData({"all": RawPart(frame, file)}, SplitConfig(by="random"), SMALL, "f")
    with pytest.raises(DataError) as caught:
        prepare(raw, None, workdir=tmp_path / "work", seed=1, progress=False)
    assert message in str(caught.value)


def test_parts_of_different_types_are_refused(tmp_path: Path) -> None:
    frames = {"train": [1, 2], "valid": ["a", "b"], "test": [3, 4]}
    parts = {
        name: RawPart(pl.LazyFrame({"click": [0, 1], "ad": values}), Path(f"{name}.parquet"))
        for name, values in frames.items()
    }
    raw = RawData(parts, SplitConfig(by="given"), SMALL, "f")
    with pytest.raises(DataError, match=r"valid\.parquet: column ad: String here, but Int64 in train\.parquet"):
        prepare(raw, None, workdir=tmp_path, seed=1, progress=False)


def test_the_part_with_the_bad_row_is_named(tmp_path: Path) -> None:
    parts = {
        name: RawPart(pl.LazyFrame({"click": [0, label], "ad": ["a", "b"]}), Path(f"{name}.parquet"))
        for name, label in {"train": 1, "valid": 1, "test": 7}.items()
    }
    raw = RawData(parts, SplitConfig(by="given"), SMALL, "f")
    with pytest.raises(DataError, match=r"test\.parquet: column click, row 2: the label is 7"):
        prepare(raw, None, workdir=tmp_path, seed=1, progress=False)


@pytest.mark.parametrize(
    ("split", "message"),
    [
        (
            SplitConfig(by="given"),
            "data.split.by: the source has one part, not train, valid and test. split by time",
        ),
        (SplitConfig(by="time"), "data.split.by: a split by time needs features.timestamp. name the column"),
    ],
)
def test_a_split_that_cannot_be_is_refused(tmp_path: Path, split: SplitConfig, message: str) -> None:
    part = RawPart(pl.LazyFrame({"click": [0, 1], "ad": ["a", "b"]}), Path("log.parquet"))
    with pytest.raises(ConfigError) as caught:
        prepare(RawData({"all": part}, split, SMALL, "f"), None, workdir=tmp_path, seed=1, progress=False)
    assert message in str(caught.value)


def test_times_of_every_kind_keep_their_order() -> None:
    texts = ["2026-01-02", "2026-01-02T03:04:05", "2026-01-02 03:04:05.5", "2026-01-02T03:04:05+01:00"]
    key = time_key(pl.Series("t", texts), "log")
    assert np.argsort(key).tolist() == [0, 3, 1, 2]
    dates = pl.Series("t", [datetime(2026, 1, 2), datetime(2026, 1, 1)])
    for unit in ("ms", "us", "ns"):
        assert time_key(dates.cast(pl.Datetime(unit)), "log").tolist() == time_key(dates, "log").tolist()
    assert time_key(dates.cast(pl.Date), "log").tolist() == time_key(dates, "log").tolist()


TASKS = SPEC.model_copy(update={"tasks": ("buy",)})


@pytest.mark.parametrize(
    ("buy", "message"),
    [
        (None, "column buy: no such column"),
        ([0, 1, None, 2] * 5, "column buy, row 4: the label is 2. write 0, 1, or null where it is not known."),
        (["0", "1"] * 10, "column buy: the label is String, not a number. write it as 0 and 1"),
        ([None] * 20, "column buy: every one of 20 values is null. drop the column from features.tasks"),
        ([float("nan")] * 20, "column buy: every one of 20 values is null."),
    ],
)
def test_a_bad_label_of_a_task_is_refused(tmp_path: Path, buy: Any, message: str) -> None:
    log = pl.LazyFrame({**GOOD, **({} if buy is None else {"buy": buy})}, strict=False)
    raw = RawData({"all": RawPart(log, Path("log.parquet"))}, SplitConfig(by="time"), TASKS, "f")
    with pytest.raises(DataError) as caught:
        prepare(raw, None, workdir=tmp_path, seed=1, progress=False)
    assert message in str(caught.value)
    assert "log.parquet" in str(caught.value)
