from __future__ import annotations

import pytest
import torch

from ctr_models.gates import GATES, SigmoidGate
from ctr_models.gates.probe import SMALL, Case, Sizes, cases, inputs, row


def test_a_context_is_given_where_models_give_one() -> None:
    places = {name: [case.place for case in cases(name)] for name in ("sigmoid2", "mixer", "softmax", "annealed")}
    assert places == {
        "sigmoid2": ["feature", "feature with a context", "field", "field with a context"],
        "mixer": ["field"],
        "softmax": ["expert", "expert with histories", "interaction"],
        "annealed": ["selection"],
    }


def test_a_gate_that_works_by_a_hook_makes_no_mask() -> None:
    assert {
        c.name: c.masks for n in ("none", "sigmoid", "temperature") for c in cases(n) if c.slot == "attention"
    } == {
        "none": True,
        "sigmoid": True,
        "temperature": False,
    }
    assert not any(case.masks for name in GATES for case in cases(name) if case.slot == "sequence")


def test_it_uses_the_gate_as_self_attention_does() -> None:
    case = Case("sigmoid", "attention", True)
    use = case.use()
    scores, absent, values, x = inputs(case, use.gate)
    weights = scores.masked_fill(absent, -torch.inf).softmax(-1)
    assert isinstance(use.gate, SigmoidGate)
    mask = torch.sigmoid(x @ use.gate.linear.weight.T).unsqueeze(1)
    torch.testing.assert_close(use(scores, absent, values, x), (weights @ values) * mask)


def test_histories_are_of_many_lengths_or_of_one() -> None:
    case = Case("none", "sequence", True)
    uneven, even = (inputs(case, case.gate(), Sizes(even=even))[2].diff() for even in (False, True))
    assert {0, 1, SMALL.history} <= set(uneven.tolist())
    assert set(even.tolist()) == {SMALL.history}


@pytest.mark.parametrize("slot", ["sequence", "expert"])
def test_a_row_takes_its_history_along(slot: str) -> None:
    case = Case("none", slot, True)
    given = inputs(case, case.gate())
    jagged, along = (2, 0) if slot == "sequence" else (2, 1)
    offsets = given[jagged]
    for i in range(SMALL.rows):
        alone = row(case, given, i)
        assert alone[jagged].tolist() == [0, int(offsets[i + 1] - offsets[i])]
        assert torch.equal(alone[along], given[along][offsets[i] : offsets[i + 1]])
        assert alone[3].shape[0] == 1


def test_the_claim_of_an_identity_start_is_read_from_the_config() -> None:
    assert Case("sigmoid", "cross", True).claims_identity
    assert not Case("cross_stream", "fusion", True).claims_identity
