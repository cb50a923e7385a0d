"""What a request gives wins over what stands under it; null gives nothing."""

from __future__ import annotations

from typing import Any

import pytest

from pipelines.features.overlay import overlaid


@pytest.mark.parametrize(
    ("under", "over", "whole"),
    [
        ({}, {}, {}),
        ({"a": 1}, {}, {"a": 1}),
        ({"a": 1}, {"a": 2, "b": 3}, {"a": 2, "b": 3}),
        ({"a": 1, "c": None}, {"a": None, "b": None, "c": 0}, {"a": 1, "b": None, "c": 0}),
        ({"a": 1}, {"a": []}, {"a": []}),
    ],
)
def test_the_second_wins_where_it_gives_a_value(
    under: dict[str, Any], over: dict[str, Any], whole: dict[str, Any]
) -> None:
    before = dict(under), dict(over)
    assert overlaid(under, over) == whole
    assert (under, over) == before
