"""When an answer stops being of use, and what is no deadline."""

from __future__ import annotations

import math

import pytest

from serving.deadline import deadline_of
from serving.schemas import Refused


def test_a_deadline_counts_from_the_arrival() -> None:
    assert deadline_of(b"250", arrived=10.0) == 10.25
    assert deadline_of(b"0.5", arrived=10.0) == 10.0005
    assert deadline_of(b"inf", arrived=10.0) == deadline_of(None, arrived=10.0) == math.inf


@pytest.mark.parametrize("wrong", ["soon", "-1", "0", "nan", "", "1 s", "9" * 100 + "x"])
def test_what_is_no_number_above_0_is_refused_by_name(wrong: str) -> None:
    with pytest.raises(Refused) as caught:
        deadline_of(wrong.encode(), arrived=10.0)
    (problem,) = caught.value.problems
    assert (caught.value.status, problem.loc, problem.type) == (422, ["header", "X-Deadline-Ms"], "deadline")
    assert wrong[:40] in problem.msg and len(problem.msg) < 100
