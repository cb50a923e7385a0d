"""What a store says that it holds, and what a model finds lacking."""

from __future__ import annotations

from typing import Any

import polars as pl
import pytest

from pipelines.features.spec import FeatureSpec
from pipelines.features.stored import Entity, Stored, key_hash


def spec(**changes: Any) -> FeatureSpec:
    history = {"name": "seen", "kind": "sequence", "table": "ad", "max_length": 5, "from_log": {"column": "ad"}}
    return FeatureSpec.model_validate(
        {
            "label": "click",
            "user": "u",
            "item": "ad",
            "timestamp": "t",
            "columns": [
                {"name": "user", "source": "u", "kind": "categorical", "role": "user"},
                {"name": "city", "kind": "categorical", "role": "user"},
                {"name": "ad", "kind": "categorical", "role": "item"},
                {"name": "price", "kind": "numeric", "role": "item"},
                {"name": "price_of_user", "source": "price", "kind": "numeric", "role": "user"},
                {"name": "hour", "kind": "categorical"},
                {"name": "city_hour", "kind": "cross", "of": ["city", "hour"]},
                history,
            ],
            **changes,
        }
    )


def stored(**changes: Any) -> Stored:
    return Stored.of(spec(**changes), {"u": "text", "ad": "integer"})


def test_columns_go_by_role_and_ids_are_not_stored_twice() -> None:
    held = stored()
    assert held.user == Entity(key="u", type="text", columns=("city", "seen"))
    assert held.item == Entity(key="ad", type="integer", columns=("price",))
    assert held.lacks(spec()) == []


def test_histories_are_the_users_whatever_their_role() -> None:
    assert "seen" in stored().user.columns  # type: ignore[union-attr]
    assert stored().histories["seen"].model_dump() == {"column": "ad", "rows": "clicks", "max_length": 5}


def test_another_definition_is_told_what_is_lacking() -> None:
    columns = spec().model_dump(mode="json")["columns"]
    longer = [*columns[:-1], {**columns[-1], "max_length": 9}]
    every = [*columns[:-1], {**columns[-1], "from_log": {"column": "ad", "rows": "all"}}]
    more = [*columns, {"name": "age", "kind": "numeric", "role": "user"}]
    assert stored().lacks(spec(columns=longer)) == ["history 'seen' holds 5 events, the model reads 9"]
    assert stored(columns=longer).lacks(spec()) == []
    assert stored().lacks(spec(columns=every)) == ["history 'seen' is made of other rows than the model's"]
    assert stored().lacks(spec(columns=more)) == ["no column 'age' of users"]
    assert stored().lacks(spec(user="other")) == ["users are stored by 'u', the model knows them by 'other'"]


def test_a_log_without_users_stores_none() -> None:
    only = FeatureSpec.model_validate(
        {"label": "click", "item": "ad", "columns": [{"name": "ad", "kind": "categorical", "role": "item"}]}
    )
    held = Stored.of(only, {"ad": "integer"})
    assert held.user is None
    assert held.lacks(spec())[0] == "users are not stored, the model knows them by 'u'"


@pytest.mark.parametrize(
    ("kind", "values", "texts"),
    [
        ("integer", [7, 7.0, "7", True], ["7", "7", "7", "1"]),
        ("text", ["7", 7, "", None, "é"], ["7", "7", None, None, "é"]),
        ("float", [0.5, "0.5", -0.0, 1], ["0.5", "0.5", "0.0", "1.0"]),
    ],
)
def test_an_id_has_one_text(kind: Any, values: list[Any], texts: list[str | None]) -> None:
    entity = Entity(key="k", type=kind, columns=())
    assert [entity.id(v) for v in values] == texts


@pytest.mark.parametrize("column", [[3, None, -1], ["a", "", None, "ü"], [0.1, None, 2.0, float("nan")]])
def test_a_column_of_ids_reads_as_each_id_alone(column: list[Any]) -> None:
    series = pl.Series("k", column)
    kind: Any = {pl.Int64: "integer", pl.String: "text", pl.Float64: "float"}[type(series.dtype)]
    entity = Entity(key="k", type=kind, columns=())
    assert entity.ids(series).to_list() == [entity.id(v) for v in column]


def test_what_can_not_be_an_id_is_none() -> None:
    entity = Entity(key="k", type="integer", columns=())
    assert [entity.id(v) for v in ("x", 1.5, [1], {}, 2**70)] == [None] * 5


def test_hashes_are_those_of_tomorrow() -> None:
    assert key_hash(["a", "7"]).tolist() == key_hash(pl.Series(["a", "7"])).tolist()
    assert key_hash(["7"])[0] == 3578897528860387907  # snapshots of before are searched by it
