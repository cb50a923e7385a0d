"""Fitting, merging, saving, loading."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctr_models.errors import ArtifactError, DataError
from pipelines.features.files import sha256_tree
from pipelines.features.spec import FeatureSpec
from pipelines.features.state import FeatureState
from tests.pipelines.features.every_kind import COLUMNS


def spec(*columns: dict[str, Any]) -> FeatureSpec:
    return FeatureSpec.model_validate({"label": "y", "columns": list(columns)})


def log(**columns: Any) -> pl.LazyFrame:
    rows = len(next(iter(columns.values())))
    return pl.LazyFrame({"y": [0] * rows, **columns})


EVERYTHING = spec(*COLUMNS)


def ids_of(state: FeatureState, table: str) -> dict[Any, int]:
    values, ids = state.tables[table].known()
    return dict(zip(values.to_list(), ids.tolist(), strict=True))


ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "ad": st.one_of(st.none(), st.sampled_from(["a", "b", "c", "d", "é", ""])),
            "city": st.one_of(st.none(), st.integers(0, 9)),
            "price": st.one_of(st.none(), st.floats(-10, 10), st.just(float("nan")), st.just(float("inf"))),
            "age": st.one_of(st.none(), st.integers(-100, 100)),
            "score": st.one_of(st.none(), st.floats(-1e6, 1e6)),
            "tags": st.one_of(st.none(), st.sampled_from(["x|y", "y", "", "z||x"])),
            "seen": st.one_of(st.none(), st.lists(st.sampled_from(["a", "e"]), max_size=3)),
        }
    ),
    max_size=12,
)
DTYPES = {
    "ad": pl.String,
    "city": pl.Int64,
    "price": pl.Float64,
    "age": pl.Int64,
    "score": pl.Float64,
    "tags": pl.String,
    "seen": pl.List(pl.String),
}


def frame(rows: list[dict[str, Any]]) -> pl.LazyFrame:
    return pl.DataFrame(rows, schema=DTYPES).with_columns(y=pl.lit(0)).lazy()


def assert_same(left: FeatureState, right: FeatureState) -> None:
    assert left.rows == right.rows
    for name, table in left.tables.items():
        other = right.tables[name]
        assert table.values.to_list() == other.values.to_list()
        np.testing.assert_array_equal(table.counts, other.counts)
        np.testing.assert_array_equal(table.ids, other.ids)
        assert table.missing == other.missing
        if other.edges is None:
            assert table.edges is None
        else:
            np.testing.assert_array_equal(table.edges, other.edges)
    for name, moments in left.moments.items():
        other = right.moments[name]
        assert moments.count == other.count
        assert moments.mean == pytest.approx(other.mean, rel=1e-9, abs=1e-9)
        assert moments.deviation == pytest.approx(other.deviation, rel=1e-6, abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(first=ROWS, second=ROWS, third=ROWS)
def test_counting_parts_and_merging_is_fitting_the_whole(first: list, second: list, third: list) -> None:
    parts = [FeatureState.count(EVERYTHING, frame(rows), source="part") for rows in (first, second, third)]
    whole = FeatureState.fit(EVERYTHING, frame(first + second + third), source="whole")
    assert_same(parts[0].merge(parts[1]).merge(parts[2]).assign(), whole)
    assert_same(parts[0].merge(parts[1].merge(parts[2])).assign(), whole)


@settings(max_examples=60, deadline=None)
@given(first=ROWS, second=ROWS)
def test_merging_a_day_renumbers_nothing(first: list, second: list) -> None:
    old = FeatureState.fit(EVERYTHING, frame(first), source="day 1")
    new = old.merge(FeatureState.count(EVERYTHING, frame(second), source="day 2"))
    for name in ("ad", "tags"):
        before, after = ids_of(old, name), ids_of(new, name)
        assert before.items() <= after.items()
        assert sorted(after.values()) == list(range(2, 2 + len(after)))
    np.testing.assert_array_equal(old.tables["price"].edges, new.tables["price"].edges)
    assert new.rows == len(first) + len(second)


def test_ids_fall_with_the_count_then_rise_with_the_value() -> None:
    state = FeatureState.fit(spec({"name": "x", "kind": "categorical"}), log(x=[3, 3, 1, 9, 1, 2]), source="log")
    values, ids = state.tables["x"].known()
    assert values.to_list() == [1, 3, 2, 9]
    assert ids.tolist() == [2, 3, 4, 5]
    assert state.counts("x").tolist() == [0, 0, 2, 2, 1, 1]


def test_rare_values_keep_their_counts_for_the_next_merge() -> None:
    rare = spec({"name": "x", "kind": "categorical", "encode": {"how": "vocabulary", "min_count": 2}})
    one = FeatureState.fit(rare, log(x=["a", "b", "b", None]), source="log")
    assert one.counts("x").tolist() == [1, 1, 2]
    two = one.merge(FeatureState.count(rare, log(x=["a", "c", ""]), source="log"))
    assert two.tables["x"].known()[0].to_list() == ["b", "a"]
    assert two.counts("x").tolist() == [2, 1, 2, 2]


def test_max_size_keeps_the_most_frequent() -> None:
    small = spec({"name": "x", "kind": "categorical", "encode": {"how": "vocabulary", "max_size": 2}})
    state = FeatureState.fit(small, log(x=["a", "b", "b", "c", "c", "c"]), source="log")
    assert state.tables["x"].known()[0].to_list() == ["c", "b"]
    merged = state.merge(FeatureState.count(small, log(x=["z"] * 9), source="log"))
    assert merged.tables["x"].known()[0].to_list() == ["c", "b"]


def test_a_shared_table_learns_from_every_column() -> None:
    shared = spec(
        {"name": "ad", "kind": "categorical"},
        {"name": "seen", "kind": "sequence", "table": "ad"},
        {"name": "liked", "kind": "multi", "table": "ad", "separator": ","},
    )
    state = FeatureState.fit(
        shared, log(ad=["a", "a"], seen=[["b", None], ["b"]], liked=["c", "a,c,c"]), source="log"
    )
    assert ids_of(state, "ad") == {"a": 2, "c": 3, "b": 4}
    schema = state.schema()
    assert {f.rows for f in (*schema.sparse, *schema.sequences)} == {5}


def test_a_history_from_the_log_counts_its_column_once() -> None:
    history = FeatureSpec.model_validate(
        {
            "label": "y",
            "user": "u",
            "timestamp": "t",
            "columns": [
                {"name": "ad", "kind": "categorical"},
                {"name": "seen", "kind": "sequence", "table": "ad", "from_log": {"column": "ad"}},
            ],
        }
    )
    state = FeatureState.fit(history, log(u=[1, 1], t=[1, 2], ad=["a", "b"]), source="log")
    assert state.counts("ad").tolist() == [0, 0, 1, 1]


def test_the_schema_says_what_the_model_needs() -> None:
    state = FeatureState.fit(EVERYTHING, frame([{"ad": "a", "tags": "x"}, {"ad": "a"}]), source="log")
    schema = state.schema()
    assert [f.name for f in schema.fields] == ["score", "ad", "city", "price", "age", "tags", "seen"]
    assert [f.rows for f in schema.sparse] == [3, 9, 6, 13, 3]
    assert [f.kind for f in schema.sparse] == ["categorical"] * 4 + ["multi"]
    assert schema.sequences[0].max_length == 50


def test_it_is_saved_and_loaded_the_same(tmp_path: Path) -> None:
    rows = [{"ad": "a", "price": 1.5, "score": 0.1, "tags": "x|é"}, {"ad": "a", "age": 3, "seen": ["q"]}]
    state = FeatureState.fit(EVERYTHING, frame(rows), source="log")
    state.save(tmp_path / "one")
    loaded = FeatureState.load(tmp_path / "one")
    assert loaded.hash == state.hash
    assert_same(loaded, state)
    loaded.save(tmp_path / "two")
    assert sha256_tree(tmp_path / "one") == sha256_tree(tmp_path / "two")
    assert not any(b"pickle" in p.read_bytes() for p in (tmp_path / "one").iterdir())


def test_the_hash_changes_with_the_content() -> None:
    one = FeatureState.fit(spec({"name": "x", "kind": "categorical"}), log(x=["a", "b"]), source="log")
    two = FeatureState.fit(spec({"name": "x", "kind": "categorical"}), log(x=["a", "c"]), source="log")
    three = FeatureState.fit(spec({"name": "x", "kind": "categorical"}), log(x=["ab", ""]), source="log")
    assert len({one.hash, two.hash, three.hash}) == 3


def test_any_changed_byte_is_found(tmp_path: Path) -> None:
    rows = [{"ad": "a", "price": 1.5, "score": 0.1}, {"ad": "a", "price": 2.5, "score": 0.7}]
    FeatureState.fit(EVERYTHING, frame(rows), source="log").save(tmp_path / "s")
    for file in sorted((tmp_path / "s").iterdir()):
        whole = file.read_bytes()
        for place in range(0, len(whole), max(1, len(whole) // 25)):
            file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            with pytest.raises(ArtifactError, match=re.escape(str(tmp_path / "s"))):
                FeatureState.load(tmp_path / "s")
        file.write_bytes(whole)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "table-0000.parquet").unlink(), "table-0000.parquet: the file is missing. copy it again"),
        (lambda d: (d / "state.json").unlink(), "state.json: no FeatureState. sluice features fits one"),
        (lambda d: (d / "state.json").write_text("{"), "state.json: can't be read (Expecting property name"),
        (lambda d: (d / "state.json").write_text("[]"), "state.json: format None, this version of sluice reads 1"),
        (
            lambda d: (d / "state.json").write_text('{"format": 1}'),
            "state.json: not a FeatureState's content (KeyError",
        ),
        (
            lambda d: (d / "state.json").write_text(
                (d / "state.json").read_text().replace(' "hash": "', ' "hush": "', 1)
            ),
            "None was written. copy it again",
        ),
        (lambda d: (d / "state.json").write_text('{"format": 99}'), "state.json: format 99, this version"),
        (
            lambda d: (d / "table-0000.parquet").write_bytes((d / "table-0000.parquet").read_bytes()[:-9]),
            "table-0000.parquet: SHA-256 expected",
        ),
    ],
)
def test_a_damaged_state_is_refused_by_name(tmp_path: Path, damage: Any, message: str) -> None:
    FeatureState.fit(EVERYTHING, frame([{"ad": "a"}]), source="log").save(tmp_path / "s")
    damage(tmp_path / "s")
    with pytest.raises(ArtifactError) as caught:
        FeatureState.load(tmp_path / "s")
    assert message in str(caught.value)


def test_states_of_different_specs_do_not_merge() -> None:
    one = FeatureState.fit(spec({"name": "x", "kind": "categorical"}), log(x=["a"]), source="log")
    two = FeatureState.fit(spec({"name": "x", "kind": "categorical", "dim": 4}), log(x=["a"]), source="log")
    with pytest.raises(ArtifactError, match="different FeatureSpecs"):
        one.merge(two)


def test_states_of_different_types_do_not_merge() -> None:
    one = FeatureState.fit(spec({"name": "x", "kind": "categorical"}), log(x=["a"]), source="log")
    two = FeatureState.fit(spec({"name": "x", "kind": "categorical"}), log(x=[1]), source="log")
    with pytest.raises(DataError, match="column x: holds integer values in one log and text values in the other"):
        one.merge(two)
