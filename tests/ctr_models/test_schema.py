from __future__ import annotations

import pytest
from pydantic import ValidationError

from ctr_models import DenseField, IdField, Schema

SCHEMA = Schema(
    dense=(DenseField(name="price", dim=4, role="item"),),
    sparse=(IdField(name="user", rows=9, role="user"), IdField(name="item", rows=7, role="item")),
    sequences=(IdField(name="history", rows=7, table="item", kind="sequence", target="item", role="user"),),
)

TASKS = Schema.of({"user": 9, "item": 7}, tasks=["conversion"])


def test_sizes_and_tables() -> None:
    assert SCHEMA.width == 4 + 3 * 16
    assert {t: f.rows for t, f in SCHEMA.tables.items()} == {"user": 9, "item": 7}
    assert [f.name for f in SCHEMA.fields] == ["price", "user", "item", "history"]


def test_parts() -> None:
    assert SCHEMA.only(["history"]).sequences[0].target is None
    assert SCHEMA.only(["history", "item"]).sequences[0].target == "item"
    assert {f.dim for f in SCHEMA.with_dim(8).fields} == {8}


def test_it_survives_json() -> None:
    for schema in (SCHEMA, TASKS):
        assert Schema.model_validate_json(schema.model_dump_json()) == schema


def test_a_schema_without_tasks_is_written_as_before_there_were_any() -> None:
    assert set(SCHEMA.model_dump(mode="json")) == {"dense", "sparse", "sequences"}
    assert TASKS.model_dump(mode="json")["tasks"] == ["conversion"]


def test_tasks_stay_when_fields_change() -> None:
    assert TASKS.only(["user"]).tasks == TASKS.with_dim(8).tasks == ("conversion",)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sparse": (IdField(name="a", rows=2), IdField(name="a", rows=2))}, "appear twice"),
        ({"sparse": (IdField(name="a", rows=2), IdField(name="b", rows=3, table="a"))}, "differ in rows or dim"),
        ({"sequences": (IdField(name="h", rows=2, kind="sequence", target="x"),)}, "target 'x', which is no field"),
        (
            {"sparse": (IdField(name="c", rows=2, of=("a", "b")),)},
            r"cross 'c' is of \['a', 'b'\], which are no fields",
        ),
        ({"tasks": ("a", "a")}, "tasks appear twice"),
    ],
)
def test_what_does_not_fit_together_is_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Schema(**fields)
