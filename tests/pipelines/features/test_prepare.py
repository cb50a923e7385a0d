"""Raw logs to encoded files: equal to transform(), bit-identical, cached, whole or absent."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest

from ctr_models.errors import ArtifactError, ConfigError, RequestError
from pipelines.datasets.base import RawData, RawPart
from pipelines.datasets.config import SplitConfig
from pipelines.features import prepare as module
from pipelines.features.fit import CHUNK
from pipelines.features.online import OnlineEncoder
from pipelines.features.prepare import EncodedData, prepare
from pipelines.features.sequences import add_histories
from pipelines.features.spec import FeatureSpec
from pipelines.features.state import FeatureState
from pipelines.features.transform import encoded_rows, transform

SPEC = FeatureSpec.model_validate(
    {
        "label": "click",
        "user": "user",
        "timestamp": "time",
        "keep": ["page"],
        "columns": [
            {"name": "user_id", "source": "user", "kind": "categorical", "role": "user"},
            {"name": "ad", "kind": "categorical", "encode": {"how": "vocabulary", "min_count": 2}},
            {"name": "price", "kind": "numeric", "encode": {"how": "standard", "log": True}},
            {"name": "price_id", "source": "price", "kind": "numeric", "encode": {"how": "quantile", "buckets": 5}},
            {"name": "city", "kind": "categorical", "encode": {"how": "hash", "buckets": 11}},
            {"name": "hour", "kind": "categorical"},
            {"name": "tags", "kind": "multi", "separator": "|", "max_length": 2},
            {"name": "likes", "kind": "multi", "table": "ad"},
            {"name": "seen", "kind": "sequence", "table": "ad", "max_length": 3, "from_log": {"column": "ad"}},
            {
                "name": "hours",
                "kind": "sequence",
                "table": "hour",
                "max_length": 4,
                "from_log": {"column": "hour", "rows": "all"},
            },
        ],
    }
)


def world(rows: int, seed: int = 1) -> pl.DataFrame:
    rng = np.random.default_rng(seed)

    def some(values: list[Any]) -> list[Any]:
        return [values[i] for i in rng.integers(0, len(values), rows)]

    price = np.round(rng.lognormal(1, 2, rows), 2)
    price[rng.random(rows) < 0.1] = np.nan
    return pl.DataFrame(
        {
            "click": rng.integers(0, 2, rows),
            "user": some(["ann", "bob", "çem", None, ""]),
            "time": rng.integers(0, max(2, rows // 3), rows),
            "ad": some([f"ad{i}" for i in range(9)] + [None, ""]),
            "price": price,
            "city": some([1, 2, 3, 4, None]),
            "hour": some([*range(24), None]),
            "tags": some(["a|b|c", "b", "", None, "|c"]),
            "likes": some([["ad1", "ad2"], [], None, ["new", None]]),
            "page": rng.random(rows),
            "unused": some(["x"]),
        },
        schema_overrides={"likes": pl.List(pl.String)},
    )


def source(frame: pl.DataFrame, split: SplitConfig | None = None, fingerprint: str = "f", **more: Any) -> RawData:
    part = {"all": RawPart(frame.lazy(), Path("log.parquet"))}
    return RawData(part, split or SplitConfig(by="random"), SPEC, fingerprint, **more)


def tree(path: Path) -> dict[str, bytes]:
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def test_it_gives_what_fit_and_transform_give(tmp_path: Path) -> None:
    log = world(700)
    data = prepare(source(log), None, workdir=tmp_path, seed=3, progress=False)
    rows = {s: data.frame(s).collect() for s in ("train", "valid", "test")}
    assert sum(len(f) for f in rows.values()) == 700
    train = log[rows["train"]["__row__"].to_numpy()]
    state = FeatureState.fit(SPEC, train.lazy(), source="log")
    assert state.hash == data.state.hash
    expected = transform(state, log.lazy(), source="log").collect()
    for frame in rows.values():
        assert frame.columns == expected.columns
        want = expected[frame["__row__"].to_numpy()]
        for name in frame.columns:
            assert frame[name].to_list() == want[name].to_list(), name
        assert sum(frame.null_count().row(0)) == 0


def test_types_on_disk_are_those_of_the_contract(tmp_path: Path) -> None:
    data = prepare(source(world(300)), None, workdir=tmp_path, seed=3, progress=False)
    schema = pq.read_schema(data.files("train")[0])
    types = {f.name: str(f.type) for f in schema}
    assert types["price"] == "float"
    assert types["ad"] == types["price_id"] == "int32"
    assert "int32" in types["seen"]
    assert "list" in types["seen"]
    assert (types["__label__"], types["__user__"], types["__row__"]) == ("float", "int64", "int64")
    assert types["page"] == "double"
    assert "unused" not in types


def test_a_request_with_its_history_is_a_row_of_the_log(tmp_path: Path) -> None:
    log = world(200)
    data = prepare(source(log), None, workdir=tmp_path, seed=3, progress=False)
    encoder = OnlineEncoder(data.state)
    given = add_histories(SPEC, log).select(SPEC.request_columns)
    frame = data.frame("test").collect()
    chosen = given[frame["__row__"].to_numpy()].to_dicts()
    batch, request = encoded_rows(frame, data.schema), encoder.encode({}, {}, chosen)
    np.testing.assert_array_equal(batch.single, request.single)
    np.testing.assert_array_equal(batch.dense.view(np.uint32), request.dense.view(np.uint32))
    np.testing.assert_array_equal(batch.group, request.group)
    for name, one in batch.ragged.items():
        np.testing.assert_array_equal(one.values, request.ragged[name].values)
        np.testing.assert_array_equal(one.offsets, request.ragged[name].offsets)


@pytest.mark.parametrize("by", ["random", "time"])
def test_same_data_spec_and_seed_give_the_same_bytes(tmp_path: Path, by: Any) -> None:
    log = world(CHUNK + 4000)
    one = prepare(source(log, SplitConfig(by=by)), None, workdir=tmp_path / "a", seed=3, progress=False)
    two = prepare(source(log, SplitConfig(by=by)), None, workdir=tmp_path / "b", seed=3, progress=False)
    assert one.path.name == two.path.name
    assert tree(one.path) == tree(two.path)


def test_a_csv_gives_what_its_frame_gives(tmp_path: Path) -> None:
    log = world(400).drop("likes")
    spec = SPEC.model_copy(update={"columns": tuple(c for c in SPEC.columns if c.name != "likes")})
    log.with_columns(pl.col("price").fill_nan(None)).write_csv(tmp_path / "log.csv")
    csv = RawPart(pl.scan_csv(tmp_path / "log.csv"), tmp_path / "log.csv")
    split = SplitConfig(by="time")
    one = prepare(RawData({"all": csv}, split, spec, "1"), None, workdir=tmp_path / "w", seed=1, progress=False)
    frame = RawPart(log.lazy(), Path("log.parquet"))
    two = prepare(RawData({"all": frame}, split, spec, "2"), None, workdir=tmp_path / "w", seed=1, progress=False)
    for name in ("train", "valid", "test"):
        assert one.files(name)[0].read_bytes() == two.files(name)[0].read_bytes()


def test_row_groups_are_even(tmp_path: Path) -> None:
    data = prepare(source(world(2 * CHUNK)), None, workdir=tmp_path, seed=3, progress=False)
    file = pq.ParquetFile(data.files("train")[0])
    sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    assert all(size == CHUNK for size in sizes[:-1])
    assert sum(sizes) == data.rows("train")
    assert file.metadata.row_group(0).column(0).compression == "LZ4"


def test_a_second_call_reuses_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = world(200)
    one = prepare(source(log), None, workdir=tmp_path, seed=3, progress=False)

    def forbidden(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("staged again")

    with monkeypatch.context() as patch:
        patch.setattr(module, "stage", forbidden)
        two = prepare(source(log), None, workdir=tmp_path, seed=3, progress=False)
    assert two.path == one.path
    assert two.state.hash == one.state.hash
    others = [
        prepare(source(log), None, workdir=tmp_path, seed=4, progress=False),
        prepare(source(log, fingerprint="g"), None, workdir=tmp_path, seed=3, progress=False),
        prepare(source(log, SplitConfig(by="time")), None, workdir=tmp_path, seed=3, progress=False),
        prepare(source(log), SPEC.model_copy(update={"dim": 3}), workdir=tmp_path, seed=3, progress=False),
    ]
    assert len({d.path for d in (one, *others)}) == 5


def test_a_failure_half_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(module._Writer, "close", fail)
        with pytest.raises(RuntimeError, match="disk is full"):
            prepare(source(world(100)), None, workdir=tmp_path, seed=3, progress=False)
    assert list((tmp_path / "features").iterdir()) == []


def test_leftovers_of_killed_runs_go_after_a_day(tmp_path: Path) -> None:
    old, new = tmp_path / "features" / ".stage.old", tmp_path / "features" / ".stage.new"
    for leftover in (old, new):
        leftover.mkdir(parents=True)
        (leftover / "log.parquet").write_bytes(b"half")
    os.utime(old, (0, 0))
    prepare(source(world(100)), None, workdir=tmp_path, seed=3, progress=False)
    assert not old.exists()
    assert new.exists()


def test_given_parts_are_kept(tmp_path: Path) -> None:
    log = world(300).sort("time")
    cuts = {"train": log[:200], "valid": log[200:250], "test": log[250:]}
    parts = {name: RawPart(frame.lazy(), Path(f"{name}.parquet")) for name, frame in cuts.items()}
    raw = RawData(parts, SplitConfig(by="given"), SPEC, "f", truth="unused")
    shuffled = {**parts, "test": parts["train"], "train": parts["test"]}
    wrong = RawData(shuffled, SplitConfig(by="given"), SPEC, "g")
    with pytest.warns(UserWarning, match="begins before an earlier part ends"):
        prepare(wrong, None, workdir=tmp_path, seed=1, progress=False)
    data = prepare(raw, None, workdir=tmp_path, seed=1, progress=False)
    assert [data.rows(n) for n in ("train", "valid", "test")] == [200, 50, 50]
    assert data.frame("test").collect()["__row__"].to_list() == list(range(250, 300))
    assert data.truth == "unused"
    assert data.frame("test").collect()["unused"].to_list() == ["x"] * 50
    # Histories reach across the parts.
    whole = transform(data.state, log.lazy(), source="log").collect()
    assert data.frame("test").collect()["seen"].to_list() == whole["seen"][250:].to_list()


def test_a_moved_folder_opens(tmp_path: Path) -> None:
    data = prepare(source(world(100)), None, workdir=tmp_path, seed=3, progress=False)
    moved = data.path.rename(tmp_path / "moved")
    opened = EncodedData.open(moved)
    assert opened.schema == data.schema
    assert opened.rows("train") == data.rows("train")
    assert opened.manifest == json.loads((moved / "manifest.json").read_text())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda p: (p / "manifest.json").unlink(),
            "manifest.json: no encoded features. sluice features makes them",
        ),
        (lambda p: (p / "manifest.json").write_text("{}"), "not a manifest of encoded features"),
        (
            lambda p: (p / "manifest.json").write_text((p / "manifest.json").read_text().replace('"bytes"', '"b"')),
            "not a manifest of encoded features ('bytes')",
        ),
        (
            lambda p: (p / "test/part-00000.parquet").unlink(),
            "test/part-00000.parquet: the file is missing. remove",
        ),
        (lambda p: (p / "test/part-00000.parquet").write_bytes(b"x"), "part-00000.parquet: 1 bytes, "),
        (lambda p: (p / "state/state.json").unlink(), "state.json: no FeatureState"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage: Any, message: str) -> None:
    data = prepare(source(world(100)), None, workdir=tmp_path, seed=3, progress=False)
    damage(data.path)
    with pytest.raises(ArtifactError) as caught:
        EncodedData.open(data.path)
    assert message in str(caught.value)


def test_no_features_are_a_config_error(tmp_path: Path) -> None:
    raw = RawData(source(world(10)).parts, SplitConfig(by="random"), None, "f")
    with pytest.raises(ConfigError, match=r"features: the source has no features of its own\. sluice init"):
        prepare(raw, None, workdir=tmp_path, seed=1, progress=False)


def test_a_kept_column_must_not_hide_a_feature(tmp_path: Path) -> None:
    spec = SPEC.model_copy(update={"keep": ("ad",)})
    with pytest.raises(ConfigError, match=r"features\.keep: 'ad' is kept raw and is also the name of a feature"):
        prepare(source(world(10)), spec, workdir=tmp_path, seed=1, progress=False)


def test_labels_of_further_tasks_are_columns_and_unknown_is_nan(tmp_path: Path) -> None:
    buys = [None, 1, 0, float("nan")] * 75
    log = world(300).with_columns(pl.Series("buy", buys, dtype=pl.Float64, strict=False), pl.lit(0.5).alias("p"))
    spec = SPEC.model_copy(update={"tasks": ("buy",)})
    plain = prepare(source(log), SPEC, workdir=tmp_path, seed=3, progress=False)
    raw = source(log, task_truth={"buy": "p", "other": "q"})
    data = prepare(raw, spec, workdir=tmp_path, seed=3, progress=False)
    assert data.path != plain.path
    assert (data.schema.tasks, data.task_truth) == (("buy",), {"buy": "p"})
    assert EncodedData.open(data.path).task_truth == {"buy": "p"}
    assert "task_truth" not in plain.manifest
    frame = data.frame("train").collect()
    assert frame.drop("__label_buy__", "p").equals(plain.frame("train").collect())
    assert pq.read_schema(data.files("train")[0]).field("__label_buy__").type == "float"
    expected = np.array([np.nan if b is None else b for b in buys])[frame["__row__"].to_numpy()]
    np.testing.assert_array_equal(frame["__label_buy__"].to_numpy(), expected)
    whole = transform(data.state, log.lazy(), source="log").collect()
    np.testing.assert_array_equal(whole["__label_buy__"].to_numpy()[frame["__row__"].to_numpy()], expected)
    targets = encoded_rows(frame, data.schema).targets
    assert targets is not None
    np.testing.assert_array_equal(targets[:, 0], expected)
    assert encoded_rows(frame, plain.schema).targets is None


def test_a_request_of_a_model_of_several_tasks_has_no_labels(tmp_path: Path) -> None:
    log = world(200).with_columns(buy=pl.Series([0, 1] * 100))
    spec = SPEC.model_copy(update={"tasks": ("buy",), "keep": ("buy",)})
    data = prepare(source(log), spec, workdir=tmp_path, seed=3, progress=False)
    encoder = OnlineEncoder(data.state)
    given = add_histories(spec, log).select(spec.request_columns)
    batch = encoded_rows(transform(data.state, given.lazy(), source="log").collect(), data.schema)
    request = encoder.encode({}, {}, given.to_dicts())
    np.testing.assert_array_equal(batch.single, request.single)
    np.testing.assert_array_equal(batch.dense, request.dense)
    assert batch.targets is not None
    assert np.isnan(batch.targets).all()
    assert request.targets is None
    with pytest.raises(RequestError, match="candidates.0.buy: no feature has this name"):
        encoder.encode({}, {}, [{"buy": 1}])
