"""What is made of a log at first sight."""

from __future__ import annotations

import random
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from ctr_models.errors import DataError
from pipelines.datasets.click_world import SPEC, TRUTH, ClickWorldOptions, World, write_world
from pipelines.features.guess import Guess, guess
from pipelines.features.spec import FromLog

ROWS = 600


def log(**more: list[Any]) -> pl.DataFrame:
    """A log with a plain column of every kind."""
    draw = random.Random(0)
    clicks = [draw.random() < 0.3 for _ in range(ROWS)]
    return pl.DataFrame(
        {
            "clicked": [int(c) for c in clicks],
            "user_id": [f"u{i % 40}" for i in range(ROWS)],
            "country": [("ES", "PL", "FR")[i % 40 % 3] for i in range(ROWS)],
            "item_id": [draw.randrange(30) for _ in range(ROWS)],
            "price": [round(draw.lognormvariate(2, 2), 2) for _ in range(ROWS)],
            "ts": [datetime(2026, 1, 1) + timedelta(minutes=i) for i in range(ROWS)],
            **more,
        }
    )


def look(tmp_path: Path, frame: pl.DataFrame, **options: Any) -> dict[str, Guess]:
    frame.write_parquet(tmp_path / "log.parquet")
    return {g.name: g for g in guess(tmp_path / "log.parquet", **options).guesses}


def test_the_four_columns_and_a_history(tmp_path: Path) -> None:
    log().write_parquet(tmp_path / "log.parquet")
    spec = guess(tmp_path / "log.parquet").spec
    assert (spec.label, spec.user, spec.item, spec.timestamp) == ("clicked", "user_id", "item_id", "ts")
    by_name = {c.name: c for c in spec.columns}
    assert list(by_name) == ["user_id", "country", "item_id", "price", "history"]
    assert by_name["country"].role == "user"
    assert by_name["item_id"].kind == "categorical"
    assert by_name["price"].encoding.model_dump() == {"how": "standard", "log": True, "clip": 10.0}
    assert by_name["history"].from_log == FromLog(column="item_id")
    assert by_name["history"].target == "item_id"


def test_every_guess_is_explained(tmp_path: Path) -> None:
    found = look(tmp_path, log())
    assert found["clicked"].why.startswith("holds only 0 and 1; ")
    assert found["user_id"].why == "40 distinct values in 600 rows"
    assert found["country"].why.endswith("the same in all rows of one user_id, so it describes the user")
    assert "long-tailed" in found["price"].why
    assert "rows in order" in found["ts"].why


def test_the_click_world_is_seen_as_it_is(tmp_path: Path) -> None:
    write_world(ClickWorldOptions(rows=20_000, users=300, items=200), tmp_path / "world")
    spec = guess(tmp_path / "world").spec
    assert (spec.label, spec.user, spec.item, spec.timestamp) == (SPEC.label, SPEC.user, SPEC.item, SPEC.timestamp)
    assert spec.keep == (TRUTH,)
    assert [(c.name, c.kind, c.role) for c in spec.columns] == [(c.name, c.kind, c.role) for c in SPEC.columns]


@pytest.mark.parametrize(
    ("column", "why"),
    [
        ([None] * ROWS, "every value is missing"),
        (["x"] * ROWS, "always 'x'"),
        ([f"row-{i}" for i in range(ROWS)], "nothing to learn from a value seen once"),
        ([{"a": i} for i in range(ROWS)], "can't be encoded"),
        ([datetime(2026, 1, 1 + i % 9) for i in range(ROWS)], "a second date or time"),
    ],
)
def test_columns_are_left_out_for_a_reason(tmp_path: Path, column: list[Any], why: str) -> None:
    found = look(tmp_path, log(extra=column))["extra"]
    assert (found.use, found.column) == ("left out", None)
    assert why in found.why


def test_what_tells_the_click_is_left_out(tmp_path: Path) -> None:
    outcome = pl.col("clicked").replace_strict({0: "seen", 1: "bought"})
    found = look(tmp_path, log().with_columns(dwell=pl.col("clicked") * 3.5, outcome=outcome))
    for name in ("dwell", "outcome"):
        assert "tells the label almost alone (AUC 1.000)" in found[name].why
        assert found[name].column is None


def test_scores_are_kept_and_not_learnt_from(tmp_path: Path) -> None:
    found = look(tmp_path, log(propensity_score=[0.1 * (i % 7) for i in range(ROWS)]))["propensity_score"]
    assert (found.use, found.column) == ("keep", None)


def test_several_values_and_given_histories(tmp_path: Path) -> None:
    draw = random.Random(1)
    sets = ["|".join(draw.sample(["war", "drama", "comedy", "crime"], draw.randint(1, 3))) for _ in range(ROWS)]
    seen = [[draw.randrange(30) for _ in range(draw.randint(0, 5))] for _ in range(ROWS)]
    # The history stands before the item, whose table it shares.
    frame = (
        log(genres=sets)
        .with_columns(pl.Series("recent_items", seen))
        .select("recent_items", pl.exclude("recent_items"))
    )
    found = look(tmp_path, frame)
    genres, history = found["genres"].column, found["recent_items"].column
    assert genres is not None
    assert (genres.kind, genres.separator, genres.max_length) == ("multi", "|", 3)
    assert history is not None
    assert (history.kind, history.table, history.target, history.max_length) == (
        "sequence",
        "item_id",
        "item_id",
        5,
    )
    assert "history" not in found


def test_names_that_the_spec_does_not_accept_get_one(tmp_path: Path) -> None:
    frame = log(**{"site category": ["a", "b"] * (ROWS // 2), "site-category": ["b", "c"] * (ROWS // 2)})
    found = look(tmp_path, frame)
    first, second = found["site category"].column, found["site-category"].column
    assert first is not None
    assert second is not None
    assert (first.name, first.column) == ("site_category", "site category")
    assert (second.name, second.column) == ("site_category_2", "site-category")


def test_a_history_finds_an_item_under_another_name(tmp_path: Path) -> None:
    frame = log(history=[[1, 2, 3]] * ROWS).rename({"item_id": "item-id"})
    frame.write_parquet(tmp_path / "log.parquet")
    spec = guess(tmp_path / "log.parquet").spec
    history = next(c for c in spec.columns if c.name == "history")
    assert (history.table, history.target) == ("item_id", "item_id")


def test_items_that_a_gap_made_floats_are_still_items(tmp_path: Path) -> None:
    items = [float(i % 30) if i % 7 else None for i in range(ROWS)]
    log(item_id=items).write_parquet(tmp_path / "log.parquet")
    by_name = {c.name: c for c in guess(tmp_path / "log.parquet").spec.columns}
    assert by_name["item_id"].kind == "categorical"
    assert by_name["history"].target == "item_id"


def test_given_columns_need_no_guessing(tmp_path: Path) -> None:
    frame = log(bought=[i % 5 == 0 for i in range(ROWS)]).rename({"user_id": "who", "item_id": "what"})
    frame.write_parquet(tmp_path / "log.parquet")
    spec = guess(tmp_path / "log.parquet", label="bought", user="who", item="what").spec
    assert (spec.label, spec.user, spec.item) == ("bought", "who", "what")
    with pytest.raises(DataError, match=r"no column 'whom'. did you mean 'who'"):
        guess(tmp_path / "log.parquet", user="whom")


def test_no_label_is_an_error_that_says_how_to_go_on(tmp_path: Path) -> None:
    frame = log().drop("clicked")
    frame.write_parquet(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"must hold only 0 and 1 to be the label; none does. name .* --label"):
        guess(tmp_path / "a.parquet")
    two = frame.with_columns(a=pl.lit(pl.Series([0, 1] * (ROWS // 2))), b=pl.lit(pl.Series([1, 0] * (ROWS // 2))))
    two.write_parquet(tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"columns a, b do, and none is named like a label"):
        guess(tmp_path / "b.parquet")


def test_csv_zip_codes_keep_their_zeros(tmp_path: Path) -> None:
    frame = log(zip=[f"0{2000 + i % 50}" for i in range(ROWS)])
    frame.write_csv(tmp_path / "log.csv", separator=";")
    proposal = guess(tmp_path / "log.csv")
    assert proposal.source.options["types"] == {"zip": "text"}
    assert (proposal.source.name, proposal.source.rows) == ("csv", ROWS)
    assert proposal.spec.timestamp == "ts"
    column = next(c for c in proposal.spec.columns if c.name == "zip")
    assert column.kind == "categorical"


def test_only_the_sample_is_looked_at(tmp_path: Path) -> None:
    log().write_parquet(tmp_path / "log.parquet")
    proposal = guess(tmp_path / "log.parquet", sample=100)
    assert (proposal.sample, proposal.source.rows) == (100, ROWS)


def test_no_rows_is_an_error(tmp_path: Path) -> None:
    log().clear().write_parquet(tmp_path / "log.parquet")
    with pytest.raises(DataError, match=r"log.parquet: there are no rows"):
        guess(tmp_path / "log.parquet")


def test_a_world_day_has_the_columns_of_its_spec() -> None:
    frame = World(ClickWorldOptions(rows=700, days=7, users=30, items=30)).day(0)
    assert set(SPEC.raw_columns) <= set(frame.columns)
