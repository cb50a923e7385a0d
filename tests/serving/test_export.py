"""The export: every exposure once, every event for the one exposure that it followed, readable as training data."""

from __future__ import annotations

import json
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal
from typer.testing import CliRunner

from ctr_models.errors import DataError
from pipelines.cli import build_app
from pipelines.datasets.base import open_data
from pipelines.datasets.config import DataConfig
from pipelines.features.prepare import prepare
from pipelines.release.example import SPEC, example_log
from serving import export as module
from serving.database import Database
from serving.events import exposure
from serving.export import SKEW, Day, export
from tests.serving.live_log import CARD, DAY, LATER, event, micros, shown


@pytest.fixture
def database(events_url: str) -> Database:
    made = Database(events_url)
    made.create()
    return made


def read(out: Path) -> pl.DataFrame:
    frame = pl.scan_parquet(out / "*" / "*.parquet", hive_partitioning=False).collect()
    return frame.sort("time", "served_exposure_id", "served_candidate")


def clicked(out: Path) -> list[tuple[str, int]]:
    return read(out).filter(pl.col("click") == 1).select("served_request_id", "served_candidate").rows()


def test_rows_are_candidates_with_what_came_of_them(database: Database, tmp_path: Path) -> None:
    rows = [shown("r1", 1), shown("r2", 2, "c", extra=1.5)]
    rows += [
        event(1.1, request_id="r1", candidate=1),
        event(1.2, "conversion", request_id="r1", item="b", value=9.5),
    ]
    rows += [event(2.1, "skip", unit="u", item="c"), event(3, request_id="unknown", candidate=0)]
    database.insert(rows)
    (told,) = export(database, tmp_path / "out", now=LATER)
    span = micros(-24) - SKEW, micros(48)
    assert told == Day("2026-11-20", True, 2, 3, 1, 1, 1, 1, ["part-00000.parquet"], 2, 4, *span)
    frame = read(tmp_path / "out")
    shown_columns = frame.select("user_id", "hour", "item_id", "extra", "click", "conversion", "skip", "value")
    assert shown_columns.rows() == [
        ("u", 1, "a", None, 0, 0, 0, None),
        ("u", 1, "b", None, 1, 1, 0, 9.5),
        ("u", 2, "c", 1.5, 0, 0, 1, None),
    ]
    assert frame["time"].to_list() == [(DAY + timedelta(hours=h)).replace(tzinfo=None) for h in (1, 1, 2)]
    served = frame.row(1, named=True)
    assert served["served_request_id"] == "r1" and served["served_model"] == "clicks/3"
    assert served["served_unit"] == "u" and served["served_position"] == 1 and served["served_score"] == 0.25
    assert served["served_propensity"] == 1.0 and json.loads(served["served_gates"]) == CARD.gates
    folder = tmp_path / "out" / "day=2026-11-20"
    assert sorted(p.name for p in folder.iterdir()) == ["_manifest.json", "part-00000.parquet"]


def test_an_event_counts_for_the_last_touch_within_the_window(database: Database, tmp_path: Path) -> None:
    rows = [shown("morning", 1), shown("evening", 20), shown("other", 20, unit="v"), shown("next", 25)]
    rows += [event(19, unit="u", item="a"), event(24.5, unit="u", item="b"), event(26, unit="u", item="a")]
    rows += [event(0.5, unit="u", item="a"), event(49.5, unit="u", item="a"), event(21, unit="w", item="a")]
    database.insert(rows)
    days = export(database, tmp_path / "out", now=LATER)
    assert clicked(tmp_path / "out") == [("morning", 0), ("evening", 1), ("next", 0)]
    assert [(told.day, told.unmatched) for told in days] == [("2026-11-20", 2), ("2026-11-21", 0)]


def test_a_request_id_used_twice_means_the_last_one_before(database: Database, tmp_path: Path) -> None:
    database.insert([shown("r", 1), shown("r", 2), event(1.5, request_id="r", candidate=0)])
    database.insert([event(2.5, request_id="r", candidate=1), event(0.99, "skip", request_id="r", candidate=1)])
    export(database, tmp_path / "out", now=LATER)
    frame = read(tmp_path / "out")
    assert frame["click"].to_list() == [1, 0, 0, 1]
    assert frame["skip"].to_list() == [0, 1, 0, 0]  # a clock that is half a minute behind


def test_an_item_that_is_shown_twice_has_its_click_once(database: Database, tmp_path: Path) -> None:
    database.insert([shown("r", 1, "aba"), event(2, unit="u", item="a"), event(2, request_id="r", item="a")])
    export(database, tmp_path / "out", now=LATER)
    assert clicked(tmp_path / "out") == [("r", 0)]


def test_a_candidate_that_is_named_by_its_place_and_by_its_item_has_its_click_once(
    database: Database, tmp_path: Path
) -> None:
    database.insert([shown("r", 1, "abc"), event(2, request_id="r", candidate=1), event(2, unit="u", item="b")])
    (told,) = export(database, tmp_path / "out", now=LATER)
    assert clicked(tmp_path / "out") == [("r", 1)]
    assert (told.clicks, told.unmatched) == (1, 0)


def test_late_events_change_a_day_until_it_is_final(database: Database, tmp_path: Path) -> None:
    out = tmp_path / "out"
    database.insert([shown("r", 1)])
    assert [told.final for told in export(database, out, now=DAY + timedelta(hours=30))] == [False]
    database.insert([event(20, request_id="r", candidate=0)])
    assert [told.final for told in export(database, out, now=DAY + timedelta(hours=49))] == [True]
    assert clicked(out) == [("r", 0)]
    assert export(database, out, now=LATER) == []
    assert len(export(database, out, now=LATER, again=True)) == 1
    assert export(database, out, now=LATER, days=[date(2026, 11, 19)]) == []


def test_what_comes_after_a_day_is_final_is_exported_too(database: Database, tmp_path: Path) -> None:
    database.insert([shown("r", 1), shown("next", 25)])
    export(database, tmp_path, now=LATER)
    database.insert([event(3, "conversion", request_id="r", candidate=0)])  # from a phone that was offline
    assert export(database, tmp_path, now=LATER)[0].conversions == 1
    database.insert([shown("spooled", 2)])  # by a server that was away
    assert export(database, tmp_path, now=LATER)[0].exposures == 2
    database.insert([event(49.5, request_id="r", candidate=1)])  # too late to count
    assert [told.day for told in export(database, tmp_path, now=LATER)] == ["2026-11-21"]
    assert export(database, tmp_path, now=LATER) == []
    assert sorted(set(read(tmp_path)["served_request_id"])) == ["next", "r", "spooled"]


def test_an_exposure_that_comes_late_takes_the_event_from_the_day_before(
    database: Database, tmp_path: Path
) -> None:
    database.insert([shown("r", 23), event(26, unit="u", item="a")])
    export(database, tmp_path, now=LATER)
    assert clicked(tmp_path) == [("r", 0)]
    database.insert([shown("spooled", 25)])  # which the user saw last
    export(database, tmp_path, now=LATER)
    assert clicked(tmp_path) == [("spooled", 0)]


def test_shadow_arms_are_not_training_data(database: Database, tmp_path: Path) -> None:
    table, row = shown("r", 1)
    database.insert([(table, row), (table, {**row, "exposure_id": "s", "served": False, "arm": "deep"})])
    assert export(database, tmp_path / "out", now=LATER)[0].rows == 2


def test_many_exposures_of_changing_columns_are_each_there_once(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK_ROWS", 50)
    more: list[dict[str, Any]] = [{}, {"age": 3}, {"age": 3.5}, {"tags": ["a"]}, {"tags": []}, {"age": None}]
    rows = [shown(f"r{i}", i / 50, "abc", unit=str(i % 7), **more[i % 6]) for i in range(300)]
    rows += [event(i / 50, request_id=f"r{i}", candidate=i % 3) for i in range(0, 300, 2)]
    database.insert(rows)
    (told,) = export(database, tmp_path / "out", now=LATER)
    assert (told.rows, told.clicks, told.unmatched) == (900, 150, 0)
    frame = read(tmp_path / "out")
    assert frame.select("served_exposure_id", "served_candidate").n_unique() == 900
    assert sorted(clicked(tmp_path / "out")) == sorted((f"r{i}", i % 3) for i in range(0, 300, 2))
    assert frame.schema["age"] == pl.Float64 and frame.schema["tags"] == pl.List(pl.String)


@pytest.mark.parametrize("chunk", [1, 100_000])
def test_a_column_that_is_a_list_in_some_requests_is_one_in_all(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(module, "CHUNK_ROWS", chunk)
    given: list[Any] = ["a|b", ["x", "y"], None, []]
    database.insert([shown(f"r{i}", 1 + i, "a", tags=tags) for i, tags in enumerate(given)])
    export(database, tmp_path, now=LATER)
    assert read(tmp_path)["tags"].to_list() == [["a|b"], ["x", "y"], None, []]


def test_what_is_exported_trains(database: Database, tmp_path: Path) -> None:
    log = example_log(120, seed=3).with_columns(pl.lit("Graz").alias("city"))
    user, item = ("user_id", "city", "clicked"), ("item_id", "price", "tags")
    rows = []
    for i, row in enumerate(log.to_dicts()):
        given = {k: row[k] for k in user}, {"hour": row["hour"]}, [{k: row[k] for k in item}]
        table, made = exposure(request_id=f"r{i}", given=given, scores=np.ones(1), card=CARD, schema_hash="ef")
        rows.append((table, {**made, "time": micros(i / 10)}))
        if row["click"]:
            rows.append(event(i / 10, request_id=f"r{i}", candidate=0))
    database.insert(rows)
    export(database, tmp_path / "out", now=LATER)
    path = tmp_path / "out" / "day=*" / "*.parquet"
    data = open_data(DataConfig(source="parquet", path=path))
    again = data.parts["all"].frame.sort("time").select(log.columns).collect()
    assert_frame_equal(again, log, check_dtypes=False)
    spec = SPEC.model_copy(update={"timestamp": "time"})
    encoded = prepare(data, spec, workdir=tmp_path / "work", seed=0, progress=False)
    assert sum(encoded.rows(split) for split in ("train", "valid", "test")) == 120


def test_a_name_that_is_taken_is_told_and_leaves_nothing(database: Database, tmp_path: Path) -> None:
    database.insert([shown("r1", 1, click=1)])
    with pytest.raises(DataError, match=r"request r1: a request brings a column 'click'.*--label"):
        export(database, tmp_path / "out", now=LATER)
    assert not list((tmp_path / "out").glob("*"))
    assert export(database, tmp_path / "out", now=LATER, label="label")[0].rows == 2


def test_the_command(database: Database, tmp_path: Path) -> None:
    database.insert([shown("r", 1), event(2, request_id="r", candidate=0)])
    words = ["events", "export", "--events", database.name, "--out", str(tmp_path / "out")]
    ran = CliRunner().invoke(build_app(), [*words, "--day", "2026-11-20", "--json", str(tmp_path / "told.json")])
    assert ran.exit_code == 0, ran.output
    (told,) = json.loads((tmp_path / "told.json").read_text())["days"]
    assert (told["rows"], told["clicks"]) == (2, 1)
    missing = CliRunner().invoke(build_app(), ["events", "export", "--events", f"sqlite:///{tmp_path}/no.db"])
    assert isinstance(missing.exception, DataError) and "can't be read" in str(missing.exception)
    assert "Example" in CliRunner().invoke(build_app(), ["events", "export", "--help"]).output
