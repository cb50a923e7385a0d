"""What a request finds at a moment is what training gives a row at that moment."""

from __future__ import annotations

import tempfile
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ctr_models.errors import ConfigError, DataError
from pipelines.datasets.base import RawData, RawPart
from pipelines.datasets.config import SplitConfig
from pipelines.features.materialize import materialize
from pipelines.features.spec import FeatureSpec
from pipelines.features.stored import KEY, Features

SPEC = FeatureSpec.model_validate(
    {
        "label": "click",
        "user": "user",
        "item": "ad",
        "timestamp": "time",
        "columns": [
            {"name": "user", "kind": "categorical", "role": "user"},
            {"name": "city", "kind": "categorical", "role": "user"},
            {"name": "ad", "kind": "categorical", "role": "item"},
            {"name": "price", "kind": "numeric", "role": "item"},
            {"name": "tags", "kind": "multi", "role": "item"},
            {"name": "liked", "kind": "sequence", "table": "ad", "max_length": 2, "from_log": {"column": "ad"}},
            {
                "name": "cities",
                "kind": "sequence",
                "table": "city",
                "max_length": 3,
                "from_log": {"column": "city", "rows": "all"},
            },
        ],
    }
)


def data(log: pl.DataFrame, **parts: pl.DataFrame) -> RawData:
    every = parts or {"all": log}
    split = SplitConfig(by="given" if parts else "time")
    return RawData({n: RawPart(f.lazy(), Path(n)) for n, f in every.items()}, split, SPEC, "print")


def at(log: pl.DataFrame | RawData, moment: str | None = None) -> Features:
    raw = data(log) if isinstance(log, pl.DataFrame) else log
    with tempfile.TemporaryDirectory() as folder:
        return materialize(raw, None, workdir=Path(folder), at=moment)


def users(features: Features) -> dict[str, dict[str, Any]]:
    assert features.users is not None
    return _by_key(features.users.pieces())


def items(features: Features) -> dict[str, dict[str, Any]]:
    assert features.items is not None
    return _by_key(features.items.pieces())


def _by_key(pieces: Any) -> dict[str, dict[str, Any]]:
    rows = [row for piece in pieces for row in piece.drop("__hash__").to_dicts()]
    found = {row.pop(KEY): row for row in rows}
    assert len(found) == len(rows)
    return found


LOG = pl.DataFrame(
    {
        "click": [1, 0, 1, 1, 1],
        "user": ["ann", "ann", "ann", "bob", None],
        "time": [1, 2, 3, 3, 4],
        "city": ["Graz", None, "Wien", "Rom", "Linz"],
        "ad": [10, 11, 12, 10, 13],
        "price": [1.0, float("nan"), 3.0, 9.0, None],
        "tags": [["a"], [], ["b", "c"], None, ["d"]],
    }
)


def test_histories_end_strictly_before_the_moment_and_columns_with_it() -> None:
    found = users(at(LOG, "3"))
    assert found["ann"] == {"city": "Wien", "liked": [10], "cities": ["Graz"]}
    assert found["bob"] == {"city": "Rom", "liked": [], "cities": []}
    assert set(found) == {"ann", "bob"}


def test_after_the_last_row_everything_is_known() -> None:
    features = at(LOG)
    assert users(features)["ann"] == {"city": "Wien", "liked": [10, 12], "cities": ["Graz", "Wien"]}
    assert items(features)["10"] == {"price": 9.0, "tags": None}
    assert items(features)["11"] == {"price": None, "tags": []}
    assert features.at is None


def test_before_the_first_row_nothing_is() -> None:
    features = at(LOG, "0")
    assert users(features) == items(features) == {}


def test_the_last_of_rows_at_one_time_is_the_latest() -> None:
    log = pl.concat([LOG, LOG.tail(2).with_columns(city=pl.lit("Bari"), price=pl.lit(0.5))])
    assert users(at(log, "3"))["bob"]["city"] == "Bari"
    assert items(at(log, "4"))["10"]["price"] == 0.5


def test_without_times_the_last_row_is_the_latest() -> None:
    spec = SPEC.model_copy(update={"timestamp": None, "columns": SPEC.columns[:5]})
    with tempfile.TemporaryDirectory() as folder:
        features = materialize(data(LOG.drop("time")), spec, workdir=Path(folder))
        with pytest.raises(ConfigError, match="no times"):
            materialize(data(LOG.drop("time")), spec, workdir=Path(folder), at="3")
    assert users(features)["ann"] == {"city": "Wien"}


@pytest.mark.parametrize("size", [1, 2, 1000])
def test_pieces_make_up_the_whole(size: int) -> None:
    features = at(LOG)
    assert features.users is not None
    assert _by_key(features.users.pieces(size)) == users(features)


def test_all_parts_of_a_split_are_one_log() -> None:
    parts = {"test": LOG[3:], "train": LOG[:2], "valid": LOG[2:3]}
    assert users(at(data(LOG, **parts))) == users(at(LOG))


@pytest.mark.parametrize(
    ("times", "moment"),
    [
        ([f"2026-01-0{i}" for i in (1, 2, 3, 3, 4)], "2026-01-03"),
        ([f"2026-01-0{i}T10:00:00Z" for i in (1, 2, 3, 3, 4)], "2026-01-03T11:00:00+01:00"),
        ([datetime(2026, 1, i, 10) for i in (1, 2, 3, 3, 4)], "2026-01-03 10:00:00"),
        ([datetime(2026, 1, i, 10, tzinfo=UTC) for i in (1, 2, 3, 3, 4)], "2026-01-03T10:00:00Z"),
        ([date(2026, 1, i) for i in (1, 2, 3, 3, 4)], "2026-01-03T00:00:00"),
        ([0.5, 1.5, 2.5, 2.5, 3.5], "2.5"),
    ],
)
def test_a_moment_is_written_as_the_logs_times_are(times: list[Any], moment: str) -> None:
    assert users(at(LOG.with_columns(time=pl.Series(times)), moment)) == users(at(LOG, "3"))


@pytest.mark.parametrize("moment", ["yesterday", "2026-01-01", "1.5", ""])
def test_what_is_no_time_of_the_log_is_refused(moment: str) -> None:
    with pytest.raises(ConfigError, match=r"is no time of this log.*give a number"):
        at(LOG, moment)


def test_a_log_that_names_nobody_is_refused() -> None:
    spec = FeatureSpec.model_validate({"label": "click", "columns": [{"name": "ad", "kind": "categorical"}]})
    with pytest.raises(ConfigError, match="features.user, features.item"):
        materialize(data(LOG), spec, workdir=Path("unused"))


def test_a_bad_log_is_refused_by_its_place() -> None:
    with pytest.raises(DataError, match="all: column time, row 2"):
        at(LOG.with_columns(time=pl.Series([1, None, 3, 3, 4])))


EVENTS = st.lists(
    st.tuples(
        st.integers(0, 1),
        st.sampled_from(["ann", "bob", "", None]),
        st.integers(0, 4),
        st.sampled_from(["Graz", "Wien", "", None]),
        st.sampled_from([10, 11, 12, None]),
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=25)
@given(events=EVENTS, moment=st.integers(-1, 6))
def test_it_is_what_a_loop_over_the_log_finds(events: list[tuple[Any, ...]], moment: int) -> None:
    assume(all(any(event[column] is not None for event in events) for column in (1, 3, 4)))  # else it is refused
    log = pl.DataFrame(
        events,
        schema={"click": pl.Int8, "user": pl.String, "time": pl.Int64, "city": pl.String, "ad": pl.Int64},
        orient="row",
    ).with_columns(price=pl.col("ad") * 0.5 + pl.col("time"), tags=pl.lit([], dtype=pl.List(pl.String)))
    features = at(log, str(moment))
    ordered = sorted(log.to_dicts(), key=lambda row: row["time"])  # stable
    expected: dict[str, dict[str, Any]] = {}
    prices: dict[str, dict[str, Any]] = {}
    for row in ordered:
        if row["time"] <= moment and row["ad"] is not None:
            prices[str(row["ad"])] = {"price": row["price"], "tags": []}
        if row["time"] <= moment and row["user"]:
            before = [r for r in ordered if r["user"] == row["user"] and r["time"] < moment]
            expected[row["user"]] = {
                "city": row["city"],
                "liked": [r["ad"] for r in before if r["ad"] is not None and r["click"]][-2:],
                "cities": [r["city"] for r in before if r["city"]][-3:],
            }
    assert users(features) == expected
    assert items(features) == prices
