"""Numbers agree with their nouns."""

from __future__ import annotations

import pytest

from pipelines.wording import counted


@pytest.mark.parametrize(
    ("number", "told"), [(0, "0 worlds"), (1, "1 world"), (2, "2 worlds"), (1_000_001, "1,000,001 worlds")]
)
def test_only_one_is_singular(number: int, told: str) -> None:
    assert counted(number, "world") == told
