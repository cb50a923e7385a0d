"""What gates of slot ``attention`` must hold beyond the contract. Nothing here knows one by name."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ctr_models.gates import GATES
from ctr_models.gates.probe import Case, Sizes, cases, inputs

CASES = [case for name in GATES for case in cases(name) if case.slot == "attention"]
every_case = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def given(case: Case, sizes: Sizes) -> tuple[Tensor, ...]:
    return inputs(case, case.gate(sizes), sizes)


@every_case
def test_the_order_of_the_keys_does_not_matter(case: Case) -> None:
    sizes = Sizes(rows=4)
    gate, order = case.gate(sizes).eval(), torch.randperm(5)
    scores, absent, _, x = given(case, sizes)
    scores = scores.masked_fill(absent, -torch.inf)
    torch.testing.assert_close(gate.attend(scores[..., order], x), gate.attend(scores, x)[..., order])


@every_case
@pytest.mark.parametrize("fields", [1, 40])
def test_one_key_or_many(case: Case, fields: int) -> None:
    sizes = Sizes(rows=2, fields=fields)
    out = case.use(sizes).eval()(*given(case, sizes))
    assert out.isfinite().all()
    assert out[0].any()
