"""Golden rows look as a request looks."""

from __future__ import annotations

from typing import Any

import polars as pl
import pytest

from pipelines.features.spec import FeatureSpec
from pipelines.release.golden import golden_rows


def spec(**from_log: Any) -> FeatureSpec:
    past = {"name": "past", "kind": "sequence", "table": "item", "max_length": 2}
    return FeatureSpec.model_validate(
        {
            "label": "click",
            "user": "user",
            "timestamp": "time",
            "columns": [
                {"name": "item", "kind": "categorical"},
                {"name": "hour", "kind": "categorical", "source": "h"},
                past | {"from_log": {"column": "item", **from_log}},
            ],
        }
    )


LOG = pl.LazyFrame(
    {
        "click": [1, 1, 0, 1, 1, 0],
        "user": [1, 2, 1, 1, 1, 1],
        "time": [1, 1, 2, 3, 3, 4],
        "item": ["a", "b", "c", "d", "e", "f"],
        "h": [0, 0, 1, 1, 1, 2],
    }
)


def test_a_history_is_what_came_strictly_before() -> None:
    rows = golden_rows(LOG, spec(), rows=6)
    assert rows.columns == ["item", "h", "past"]
    assert rows["past"].to_list() == [None, None, ["a"], ["a"], ["a"], ["d", "e"]]


def test_a_history_may_hold_every_event() -> None:
    rows = golden_rows(LOG, spec(rows="all"), rows=6)
    assert rows["past"].to_list() == [None, None, ["a"], ["a", "c"], ["a", "c"], ["d", "e"]]


def test_a_history_may_hold_what_was_not_clicked() -> None:
    rows = golden_rows(LOG, spec(rows="skips"), rows=6)
    assert rows["past"].to_list() == [None, None, None, ["c"], ["c"], ["c"]]


def test_the_last_rows_are_taken_when_there_are_histories() -> None:
    assert golden_rows(LOG, spec(), rows=1)["item"].to_list() == ["f"]


def test_the_first_rows_are_taken_when_there_are_none() -> None:
    plain = FeatureSpec.model_validate({"label": "click", "columns": [{"name": "item", "kind": "categorical"}]})
    assert golden_rows(LOG, plain, rows=2).to_dict(as_series=False) == {"item": ["a", "b"]}


@pytest.mark.parametrize("missing", ["item", "h"])
def test_a_column_that_the_log_lacks_stays_away(missing: str) -> None:
    plain = FeatureSpec.model_validate(
        {"label": "click", "columns": [{"name": n, "kind": "categorical"} for n in ("item", "h")]}
    )
    assert missing not in golden_rows(LOG.drop(missing), plain).columns
