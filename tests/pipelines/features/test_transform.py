"""Raw rows to encoded columns, whatever the frame lacks; encoded columns to rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ctr_models.errors import DataError
from pipelines.features.spec import FeatureSpec
from pipelines.features.stage import open_writer
from pipelines.features.state import FeatureState
from pipelines.features.transform import encoded_rows, transform

SPEC = FeatureSpec.model_validate(
    {
        "label": "y",
        "user": "u",
        "timestamp": "t",
        "keep": ["note"],
        "columns": [
            {"name": "ad", "kind": "categorical"},
            {"name": "price", "kind": "numeric"},
            {"name": "tags", "kind": "multi"},
            {"name": "seen", "kind": "sequence", "table": "ad", "from_log": {"column": "ad"}},
        ],
    }
)
LOG = pl.DataFrame(
    {
        "y": [1, 0, 1],
        "u": [7, 7, 8],
        "t": [1, 2, 3],
        "ad": ["a", "b", "a"],
        "price": [1.0, None, 3.0],
        "tags": [["p", "q"], [], None],
        "note": ["x", None, "z"],
    }
)


@pytest.fixture(scope="module")
def state() -> FeatureState:
    return FeatureState.fit(SPEC, LOG.lazy(), source="log")


def test_a_log_gets_its_histories(state: FeatureState) -> None:
    out = transform(state, LOG.lazy(), source="log").collect()
    assert out.columns == ["price", "ad", "tags", "seen", "__label__", "__user__", "__row__", "note"]
    assert out["ad"].to_list() == [2, 3, 2]
    assert out["seen"].to_list() == [[], [2], []]
    assert out["tags"].to_list() == [[2, 3], [], []]
    assert out["__label__"].to_list() == [1.0, 0.0, 1.0]
    assert out["__row__"].to_list() == [0, 1, 2]
    assert out["note"].to_list() == ["x", None, "z"]
    assert out["__user__"][0] == out["__user__"][1] != out["__user__"][2]


def test_a_given_history_is_taken(state: FeatureState) -> None:
    given = LOG.with_columns(pl.Series("seen", [["b", "zzz"], [], None], dtype=pl.List(pl.String)))
    assert transform(state, given.lazy(), source="log").collect()["seen"].to_list() == [[3, 1], [], []]


def test_what_a_frame_lacks_is_missing(state: FeatureState) -> None:
    out = transform(state, pl.LazyFrame({"ad": ["b"], "other": [1]}), source="rows").collect()
    assert out.drop("__row__").row(0) == (0.0, 3, [], [], 0.0, 0)


def test_a_frame_that_lacks_everything_keeps_its_rows(state: FeatureState) -> None:
    out = transform(state, pl.LazyFrame({"other": [1, 2, 3]}), source="log").collect()
    assert out["ad"].to_list() == [0, 0, 0]
    assert out["__row__"].to_list() == [0, 1, 2]


def test_all_null_columns_are_missing(state: FeatureState) -> None:
    out = transform(state, pl.LazyFrame({"ad": [None], "price": [None], "tags": [None]}), source="rows").collect()
    assert out.drop("__row__").row(0) == (0.0, 0, [], [], 0.0, 0)


def test_streams_give_what_the_whole_gives(state: FeatureState, tmp_path: Path) -> None:
    many = pl.concat([LOG.drop("y", "t")] * 5000)
    whole = transform(state, many.lazy(), source="log").collect()
    transform(state, many.lazy(), source="log").sink_parquet(tmp_path / "out.parquet")
    streamed = pl.read_parquet(tmp_path / "out.parquet").sort("__row__")
    assert streamed.equals(whole)


def test_a_user_of_another_type_is_refused(state: FeatureState) -> None:
    with pytest.raises(DataError, match="log: column u: expected an integer, found 'x'"):
        transform(state, pl.LazyFrame({"u": ["x"], "ad": ["a"]}), source="log").collect()


def test_another_type_is_refused(state: FeatureState) -> None:
    with pytest.raises(DataError, match="rows: column price: expected a number, found 'dear'"):
        transform(state, pl.LazyFrame({"price": ["1", "dear"]}), source="rows").collect()
    with pytest.raises(DataError, match=r"rows: column ad: Date can't be encoded as categorical"):
        transform(state, pl.LazyFrame({"ad": [None]}, schema={"ad": pl.Date}), source="rows")


@pytest.mark.parametrize("through", ["polars", "arrow", "chunks", "parquet"])
def test_encoded_rows_from_anywhere(state: FeatureState, tmp_path: Path, through: str) -> None:
    frame = transform(state, LOG.lazy(), source="log").collect()
    table: Any = frame
    if through == "arrow":
        table = frame.to_arrow()
    elif through == "chunks":
        table = pa.concat_tables([frame[:1].to_arrow(), frame[1:1].to_arrow(), frame[1:].to_arrow().slice(0)])
    elif through == "parquet":
        with open_writer(tmp_path / "x.parquet", frame.to_arrow().schema) as writer:
            writer.write_table(frame.to_arrow(), row_group_size=2)
        table = pq.read_table(tmp_path / "x.parquet")
    rows = encoded_rows(table, state.schema())
    assert rows.single.tolist() == [[2, 3, 2]]
    assert rows.dense.ravel().tolist() == [-1.0, 0.0, 1.0]
    assert rows.ragged["tags"].values.tolist() == [2, 3]
    assert rows.ragged["tags"].offsets.tolist() == [0, 2, 2, 2]
    assert rows.ragged["seen"].offsets.tolist() == [0, 0, 1, 1]
    np.testing.assert_array_equal(rows.group, frame["__user__"].to_numpy())
    assert len(rows.batch().label) == 3


def test_a_slice_of_arrow_lists_keeps_its_values(state: FeatureState) -> None:
    table = transform(state, LOG.lazy(), source="log").collect().to_arrow().slice(1, 2)
    assert encoded_rows(table, state.schema()).ragged["seen"].values.tolist() == [2]
    assert encoded_rows(table, state.schema()).ragged["tags"].values.tolist() == []


def test_an_absent_field_is_named(state: FeatureState) -> None:
    with pytest.raises(DataError, match="column ad: no such column in the encoded rows"):
        encoded_rows(pl.DataFrame({"price": [1.0]}), state.schema())
