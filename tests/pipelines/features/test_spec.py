"""Further labels in a FeatureSpec; what else a spec refuses stands in tests/bad_inputs."""

from __future__ import annotations

import json
from typing import Any

import polars as pl
import pytest
from pydantic import ValidationError

from pipelines.features.spec import FeatureSpec
from pipelines.features.state import FeatureState

PLAIN: dict[str, Any] = {
    "label": "click",
    "user": "u",
    "timestamp": "t",
    "columns": [{"name": "ad", "kind": "categorical"}, {"name": "price", "kind": "numeric"}],
    "keep": ["n"],
}


def spec(*tasks: str, **changed: Any) -> FeatureSpec:
    return FeatureSpec.model_validate({**PLAIN, "tasks": tasks, **changed})


def test_labels_are_read_first_and_named_by_their_task() -> None:
    found = spec("conversion", "return")
    assert found.labels == {
        "__label__": "click",
        "__label_conversion__": "conversion",
        "__label_return__": "return",
    }
    assert found.raw_columns[:3] == ("click", "conversion", "return")
    assert "conversion" not in found.request_columns
    assert FeatureSpec.model_validate_json(found.model_dump_json()) == found


def test_without_tasks_a_spec_is_written_and_hashed_as_before_there_were_any() -> None:
    found = FeatureSpec.model_validate(PLAIN)
    assert "tasks" not in json.loads(found.model_dump_json())
    log = {
        "click": [0, 1, 0],
        "u": ["a", "b", "a"],
        "t": [1, 2, 3],
        "ad": ["a", "b", "a"],
        "price": [1.0, 2.0, 3.0],
    }
    state = FeatureState.fit(found, pl.LazyFrame({**log, "n": [1, 2, 3]}), source="log")
    assert state.hash == "bbead11f60d8bfc82531ca1509dc76ea0158d136310ded50a8bb161ac8e370a1"


@pytest.mark.parametrize(
    ("tasks", "changed", "message"),
    [
        (["click"], {}, "task 'click' is the label already"),
        (["buy", "buy"], {}, "task 'buy' stands there twice"),
        (["t"], {}, "task 't' is the user, item or timestamp"),
        (["ad"], {}, "column 'ad' reads the task 'ad': the model would see the answer"),
        (
            ["buy"],
            {
                "columns": [
                    *PLAIN["columns"],
                    {"name": "past", "kind": "sequence", "table": "ad", "from_log": {"column": "buy"}},
                ]
            },
            "column 'past' reads the task 'buy'",
        ),
        (["a b"], {}, "should match pattern"),
        ([""], {}, "should match pattern"),
    ],
)
def test_what_can_be_no_task_is_refused(tasks: list[str], changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        spec(*tasks, **changed)
