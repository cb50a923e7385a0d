"""What gates of slot ``sequence`` must hold beyond the contract. Nothing here knows one by name."""

from __future__ import annotations

import pytest
import torch

from ctr_models.gates import GATES
from ctr_models.gates.probe import Case, cases, inputs

CASES = [case for name in GATES for case in cases(name) if case.slot == "sequence"]
every_case = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@every_case
def test_a_history_gives_a_vector_and_an_empty_one_zeros(case: Case) -> None:
    use = case.use()
    values, scores, offsets, query = inputs(case, use.gate)
    pooled, empty = use(values, scores, offsets, query), offsets.diff() == 0
    assert empty.any() and not empty.all()
    assert (pooled[empty] == 0).all()
    assert (pooled[~empty] != 0).all()


@every_case
def test_every_behaviour_counts(case: Case) -> None:
    """Values of the longest history get a gradient, and so do the model's own scores."""
    use = case.use()
    values, scores, offsets, query = inputs(case, use.gate)
    use(values.requires_grad_(), scores.requires_grad_(), offsets, query).square().sum().backward()
    assert values.grad is not None and values.grad.abs().amax(1).min() > 0
    assert scores.grad is not None and scores.grad.abs().min() > 0
