from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from ctr_models.gates.base import GATES
from ctr_models.model import MODELS
from pipelines.config import RunConfig
from pipelines.datasets.base import DATASETS
from pipelines.reference import json_schema, reference


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return json_schema()


def _refs(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if "$ref" in node:
            yield node["$ref"]
        node = list(node.values())
    if isinstance(node, list):
        for one in node:
            yield from _refs(one)


def test_every_reference_in_the_schema_resolves(schema: dict[str, Any]) -> None:
    found = set(_refs(schema))
    assert found
    assert {ref.removeprefix("#/$defs/") for ref in found} <= set(schema["$defs"])


def test_the_schema_knows_every_registered_name(schema: dict[str, Any]) -> None:
    assert schema["properties"]["model"]["anyOf"][0]["enum"] == list(MODELS)
    assert schema["$defs"]["gate"]["anyOf"][0]["enum"] == list(GATES)
    assert schema["$defs"]["DataConfig"]["properties"]["source"]["anyOf"][0]["enum"] == list(DATASETS)


def test_a_models_branch_holds_its_options_and_slots_and_no_others(schema: dict[str, Any]) -> None:
    branches = {
        one["properties"]["name"]["const"]: one
        for one in schema["properties"]["model"]["anyOf"]
        if "const" in one.get("properties", {}).get("name", {})
    }
    assert set(branches) == set(MODELS)
    for name, branch in branches.items():
        model = MODELS[name]
        assert set(branch["properties"]) == {"name", "gates", *model.Config.model_fields}
        assert set(branch["properties"]["gates"]["properties"]) == set(model.slots())
        assert branch["additionalProperties"] is False


def test_the_schema_is_json(schema: dict[str, Any]) -> None:
    assert json.loads(json.dumps(schema)) == schema


def test_the_page_names_every_key_of_the_top_level_and_every_part() -> None:
    page = reference()
    for key in RunConfig.model_fields:
        assert f"| `{key}` |" in page
    for name in MODELS:
        assert f"### model `{name}`" in page
    for name in GATES:
        assert f"### gate `{name}`" in page


def test_the_text_below_a_field_becomes_its_description() -> None:
    row = "| `checkpoint_every` | integer >= 1 |  | Steps between checkpoints; None: at the end of each epoch. |"
    assert row in reference()
