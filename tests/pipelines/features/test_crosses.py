"""A cross is one value a combination: fitted on train, in one scan, the same in batch and request."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from ctr_models.errors import ArtifactError, DataError, RequestError
from pipelines.datasets.base import RawData, RawPart
from pipelines.datasets.config import SplitConfig
from pipelines.features.columns import Coded
from pipelines.features.crosses import Crosser
from pipelines.features.fit import CHUNK, Fitter
from pipelines.features.online import OnlineEncoder
from pipelines.features.prepare import prepare
from pipelines.features.spec import FeatureSpec
from pipelines.features.state import FeatureState
from pipelines.features.transform import encoded_rows, transform

TEXT = st.one_of(st.sampled_from(["a", "b", "ab", "é", "", "日本", "5", "a\x00b", "🙂"]), st.text(max_size=3))
VALUES: dict[Any, st.SearchStrategy] = {
    pl.Int64: st.one_of(st.integers(-2, 3), st.sampled_from([2**63 - 1, -(2**63)])),
    pl.Float64: st.one_of(st.sampled_from([0.0, -0.0, 1.5, 1e308]), st.floats()),
    pl.String: TEXT,
    pl.Boolean: st.booleans(),
    pl.UInt8: st.integers(0, 3),
}


def spec_of(
    *crosses: dict[str, Any], columns: tuple[str, ...] = ("user", "hour", "ad"), **more: Any
) -> FeatureSpec:
    plain = [{"name": name, "kind": "categorical"} for name in columns]
    made = [{"kind": "cross", **cross} for cross in crosses]
    return FeatureSpec.model_validate({"label": "y", "columns": [*made, *plain], **more})


def encoded(state: FeatureState, frame: pl.DataFrame, column: str) -> list[int]:
    return transform(state, frame.lazy(), source="rows").collect()[column].to_list()


LOG = pl.DataFrame(
    {
        "y": [0, 1, 0, 1, 0, 0],
        "user": ["ann", "ann", "bob", "ann", None, "bob"],
        "hour": [7, 7, 7, 8, 7, 7],
        "ad": [1, 2, 3, 4, 5, 6],
    }
)
BOTH = {"name": "user_x_hour", "of": ["user", "hour"]}


@st.composite
def worlds(draw: st.DrawFn) -> tuple[FeatureSpec, pl.DataFrame, pl.DataFrame]:
    """Categorical columns of any types, one perhaps sharing another's table, and crosses of them."""
    names = [f"c{i}" for i in range(draw(st.integers(2, 4)))]
    dtypes = {name: draw(st.sampled_from(list(VALUES))) for name in names}
    columns: list[dict[str, Any]] = [{"name": name, "kind": "categorical"} for name in names]
    if draw(st.booleans()):
        columns.append({"name": "shared", "kind": "categorical", "table": names[0]})
        dtypes["shared"] = dtypes[names[0]]
    sets: set[frozenset[str]] = set()
    for i in range(draw(st.integers(1, 3))):
        of = draw(st.permutations(list(dtypes)))[: draw(st.integers(2, 3))]
        if frozenset(of) in sets:
            continue
        sets.add(frozenset(of))
        encode = draw(
            st.one_of(
                st.builds(lambda low: {"how": "vocabulary", "min_count": low}, st.integers(1, 2)),
                st.builds(lambda buckets: {"how": "hash", "buckets": buckets}, st.integers(1, 9)),
            )
        )
        columns.insert(
            draw(st.integers(0, len(columns))), {"name": f"x{i}", "kind": "cross", "of": of, "encode": encode}
        )

    def frame(rows: int) -> pl.DataFrame:
        data = {"y": pl.Series([0] * rows)}
        for name, dtype in dtypes.items():
            one = st.one_of(st.none(), VALUES[dtype])
            data[name] = pl.Series(name, draw(st.lists(one, min_size=rows, max_size=rows)), dtype=dtype)
        return pl.DataFrame(data)

    spec = FeatureSpec.model_validate({"label": "y", "columns": columns})
    return spec, frame(draw(st.integers(1, 10))), frame(draw(st.integers(1, 5)))


@settings(max_examples=70, deadline=None, suppress_health_check=list(HealthCheck))
@given(world=worlds())
def test_a_request_is_encoded_as_the_batch_is(world: tuple[FeatureSpec, pl.DataFrame, pl.DataFrame]) -> None:
    spec, log, unseen = world
    state = FeatureState.fit(spec, log.lazy(), source="log")
    online = OnlineEncoder(state)
    for frame in (log, unseen):
        rows = frame.drop("y")
        batch = encoded_rows(transform(state, rows.lazy(), source="rows").collect(), state.schema())
        candidates = rows.to_dicts()
        np.testing.assert_array_equal(online.encode({}, {}, candidates).single, batch.single)
        first, *others = rows.columns
        for i, row in enumerate(candidates):  # parts given for all candidates, and parts given for each
            one = online.encode({first: row[first]}, {}, [{name: row[name] for name in others}] * 2)
            np.testing.assert_array_equal(one.single, batch.single[:, [i, i]])


@settings(max_examples=70, deadline=None, suppress_health_check=list(HealthCheck))
@given(world=worlds())
def test_ids_are_those_of_the_counted_combinations(world: tuple[FeatureSpec, pl.DataFrame, pl.DataFrame]) -> None:
    spec, log, unseen = world
    state = FeatureState.fit(spec, log.lazy(), source="log")
    # The plain columns' own ids name the combinations: every value of the log has one.
    codes = transform(state, log.lazy(), source="log").collect()
    fresh = transform(state, unseen.lazy(), source="rows").collect()
    for cross in spec.crosses:
        if cross.encoding.how != "vocabulary":
            continue
        low, counts = cross.encoding.min_count, codes.group_by(cross.of).len().rows()
        common = {row[:-1] for row in counts if row[-1] >= low and 0 not in row[:-1]}
        ids = dict(zip(codes.select(cross.of).rows(), codes[cross.name], strict=True))
        assert {pair for pair, one in ids.items() if one > 1} == common
        assert all(one == 0 for pair, one in ids.items() if 0 in pair)
        assert len({ids[pair] for pair in common}) == len(common)
        assert state.tables[cross.name].rows == 2 + len(common)
        for pair, one in zip(fresh.select(cross.of).rows(), fresh[cross.name], strict=True):
            assert one == (0 if 0 in pair else ids[pair] if pair in common else 1)


def test_min_count_missing_and_unknown() -> None:
    state = FeatureState.fit(
        spec_of(BOTH | {"encode": {"how": "vocabulary", "min_count": 2}}), LOG.lazy(), source="log"
    )
    assert sorted(encoded(state, LOG, "user_x_hour")) == [0, 1, 2, 2, 3, 3]
    new = pl.DataFrame({"user": ["ann", "bob", "eve", None, "ann"], "hour": [7, 8, 7, 7, None]})
    first, *others = encoded(state, new, "user_x_hour")
    assert first > 1
    assert others == [1, 1, 0, 0]
    assert state.counts("user_x_hour").tolist() == [1, 1, 2, 2]
    assert encoded(state, new.drop("hour"), "user_x_hour") == [0] * 5  # a column that the rows lack is missing


def test_both_columns_decide_and_their_texts_do_not_run_together() -> None:
    log = pl.DataFrame({"y": [0] * 4, "user": ["a", "ab", "a", "b"], "hour": ["bc", "c", "c", "a"], "ad": [1] * 4})
    state = FeatureState.fit(spec_of(BOTH), log.lazy(), source="log")
    assert len(set(encoded(state, log, "user_x_hour"))) == 4
    swapped = log.with_columns(user="hour", hour="user")
    assert encoded(state, swapped.filter(pl.col("hour") == "b"), "user_x_hour") == [1]  # (a, b) is not (b, a)


def test_the_schema_says_what_is_crossed() -> None:
    state = FeatureState.fit(spec_of(BOTH), LOG.lazy(), source="log")
    schema = state.schema()
    assert {f.name: f.of for f in schema.sparse} == {
        "user_x_hour": ("user", "hour"),
        "user": (),
        "hour": (),
        "ad": (),
    }
    assert schema.only(["user_x_hour", "user"]).sparse[0].of == ()
    assert state.spec.raw_columns == ("y", "user", "hour", "ad")
    assert state.spec.request_columns == ("user", "hour", "ad")


def test_parts_merged_are_the_whole_and_old_ids_stay() -> None:
    spec = spec_of(BOTH | {"encode": {"how": "vocabulary", "min_count": 2}})
    parts = [FeatureState.count(spec, piece.lazy(), source="log") for piece in (LOG[:2], LOG[2:4], LOG[4:])]
    whole = FeatureState.fit(spec, LOG.lazy(), source="log")
    assert parts[0].merge(parts[1]).merge(parts[2]).assign().hash == whole.hash
    assert parts[0].merge(parts[1].merge(parts[2])).assign().hash == whole.hash
    grown = FeatureState.fit(spec, LOG[:2].lazy(), source="log").merge(parts[1]).merge(parts[2])
    assert encoded(grown, LOG[:1], "user_x_hour") == [2]
    assert sorted(set(encoded(grown, LOG, "user_x_hour"))) == [0, 1, 2, 3]


def test_saved_and_loaded_it_is_the_same_and_damage_is_found(tmp_path: Path) -> None:
    state = FeatureState.fit(spec_of(BOTH), LOG.lazy(), source="log")
    state.save(tmp_path / "state")
    loaded = FeatureState.load(tmp_path / "state")
    assert loaded.hash == state.hash
    assert loaded.spec == state.spec
    assert encoded(loaded, LOG, "user_x_hour") == encoded(state, LOG, "user_x_hour")
    other = FeatureState.fit(spec_of(BOTH), LOG.with_columns(hour=7).lazy(), source="log")
    assert other.tables["user_x_hour"].digest() != state.tables["user_x_hour"].digest()
    file = max((tmp_path / "state").glob("table-*.parquet"))
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    with pytest.raises(ArtifactError, match="SHA-256 expected"):
        FeatureState.load(tmp_path / "state")


def test_a_spec_without_crosses_is_written_as_it_was_before_there_were_any() -> None:
    content = spec_of(BOTH).model_dump(mode="json")["columns"]
    assert [c.get("of") for c in content] == [["user", "hour"], None, None, None]
    assert all("of" not in c for c in content[1:])


def test_prepared_from_files_it_is_fitted_on_the_training_rows_only(tmp_path: Path) -> None:
    rows = CHUNK + 500
    random = np.random.default_rng(0)
    log = pl.DataFrame(
        {
            "y": random.integers(0, 2, rows),
            "user": pl.Series(random.integers(0, 50, rows)).cast(pl.String),
            "hour": random.integers(0, 24, rows),
            "ad": random.integers(0, 9, rows),
            "part": ["train"] * (rows - 400) + ["valid"] * 200 + ["test"] * 200,
        }
    ).with_columns(user=pl.when(pl.col("part") == "test").then(pl.lit("new")).otherwise("user"))
    file = tmp_path / "log.parquet"
    log.write_parquet(file)
    split = SplitConfig(by="column", column="part")
    raw = RawData({"all": RawPart(pl.scan_parquet(file), file)}, split, None, "fingerprint")
    spec = spec_of(
        BOTH | {"encode": {"how": "vocabulary", "min_count": 40}}, {"name": "all", "of": ["ad", "user", "hour"]}
    )
    data = prepare(raw, spec, workdir=tmp_path, seed=1, progress=False)
    train = log.filter(pl.col("part") == "train")
    assert data.state.hash == FeatureState.fit(spec, train.lazy(), source="log").hash
    for split_name in ("train", "valid", "test"):
        found = data.frame(split_name).collect()
        again = transform(data.state, log.filter(pl.col("part") == split_name).lazy(), source="log").collect()
        assert found["user_x_hour"].to_list() == again["user_x_hour"].to_list()
        assert found["all"].to_list() == again["all"].to_list()
    assert data.frame("test").collect()["user_x_hour"].unique().to_list() == [1]
    assert 2 < data.state.tables["user_x_hour"].rows < 2 + 50 * 24


def test_texts_of_a_dictionary_are_hashed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    crosser = Crosser(spec_of(BOTH, columns=("user", "hour")), {"user": "text", "hour": "integer"}, "log")
    coded = Coded(pl.Series(["ann", "", "bob"]), np.array([0, 2, -1, 1], dtype=np.int32))
    chunk = {"user": coded, "hour": pl.Series([7, 7, 7, 7])}
    first = dict(crosser.keys(chunk))["user_x_hour"]
    plain = dict(crosser.keys({"user": pl.Series(["ann", "bob", None, ""]), "hour": chunk["hour"]}))["user_x_hour"]
    assert first.to_list() == plain.to_list()
    assert first.is_null().to_list() == [False, False, True, True]
    monkeypatch.setattr("pipelines.features.crosses.canonical_series", lambda s, kind: s.cast(pl.Int64))
    assert dict(crosser.keys(chunk))["user_x_hour"].to_list() == first.to_list()


def test_what_can_not_be_read_names_its_column() -> None:
    state = FeatureState.fit(spec_of(BOTH), LOG.lazy(), source="log")
    with pytest.raises(DataError, match="rows: column hour: expected an integer, found 'late'"):
        encoded(state, pl.DataFrame({"user": ["ann"], "hour": ["late"]}), "user_x_hour")
    with pytest.raises(RequestError, match=r"candidates\.1\.hour: expected an integer, found 'late'"):
        OnlineEncoder(state).encode({"user": "ann"}, {}, [{"hour": 7}, {"hour": "late"}])
    with pytest.raises(RequestError, match="user_x_hour: no feature has this name"):
        OnlineEncoder(state).encode({"user_x_hour": 3}, {}, [{}])
    fitter = Fitter(spec_of(BOTH), {"user": "text", "hour": "integer", "ad": "integer"}, "log")
    bad = {"user": pl.Series(["a"]), "hour": pl.Series([1]), "ad": pl.Series([1])}
    with pytest.raises(DataError, match="log: column hour: expected an integer"):
        fitter.add(bad | {"hour": pl.Series(["late"])}, 1)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ([{"name": "x", "kind": "cross", "of": ["user"]}], r"cross 'x' needs two or more columns, each once"),
        ([{"name": "x", "kind": "cross"}], r"cross 'x' needs two or more columns, each once"),
        ([{"name": "x", "kind": "cross", "of": ["user", "user"]}], r"needs two or more columns, each once"),
        (
            [{"name": "x", "kind": "cross", "of": ["user", "hours"]}],
            r"'hours', which is no column. did you mean 'hour'",
        ),
        (
            [{"name": "x", "kind": "cross", "of": ["user", "price"]}],
            r"'price', which is numeric; cross categorical",
        ),
        ([{"name": "x", "kind": "cross", "of": ["user", "tags"]}], r"'tags', which is multi; cross categorical"),
        (
            [
                {"name": "x", "kind": "cross", "of": ["user", "hour"]},
                {"name": "z", "kind": "cross", "of": ["hour", "user"]},
            ],
            r"crosses 'x' and 'z' are of the same columns; drop one",
        ),
        (
            [
                {"name": "x", "kind": "cross", "of": ["user", "hour"]},
                {"name": "z", "kind": "cross", "of": ["x", "hour"]},
            ],
            r"cross 'z' is of 'x', which is cross; cross categorical columns",
        ),
        (
            [{"name": "x", "kind": "cross", "of": ["user", "hour"], "source": "u"}],
            r"cross 'x' reads .* drop its source",
        ),
        ([{"name": "x", "kind": "cross", "of": ["user", "hour"], "table": "user"}], r"drop its table"),
        (
            [{"name": "x", "kind": "categorical", "of": ["user", "hour"]}],
            r"of belongs to a cross; write kind: cross",
        ),
        (
            [
                {"name": "x", "kind": "cross", "of": ["user", "hour"]},
                {"name": "z", "kind": "categorical", "table": "x"},
            ],
            r"column 'z' shares table 'x', which no id column is named after",
        ),
        (
            [{"name": "x", "kind": "cross", "of": ["user", "hour"], "encode": {"how": "standard"}}],
            r"a cross column can't be encoded by 'standard', only by vocabulary, hash",
        ),
    ],
)
def test_what_is_wrong_with_a_cross_is_said(columns: list[dict[str, Any]], message: str) -> None:
    plain = [
        {"name": "user", "kind": "categorical"},
        {"name": "hour", "kind": "categorical"},
        {"name": "price", "kind": "numeric"},
        {"name": "tags", "kind": "multi"},
    ]
    with pytest.raises(ValidationError, match=message):
        FeatureSpec.model_validate({"label": "y", "columns": [*plain, *columns]})
