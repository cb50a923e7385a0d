from __future__ import annotations

import math

import pytest
import torch

from ctr_models.gates import Gate, GateShape, GateSpec
from ctr_models.gates.hard_concrete import HardConcreteGate


def make(slot: str = "selection", **options: object) -> HardConcreteGate:
    spec = GateSpec.parse({"name": "hard_concrete", **options})
    gate: Gate = spec.build(GateShape(slot=slot, width=2, fields=3))  # type: ignore[arg-type]
    assert isinstance(gate, HardConcreteGate)
    return gate


def test_outside_training_by_hand() -> None:
    # 1.2 sigmoid(a) - 0.1: 1/2 at 0, 0.8 at log 3, 0 below log(1/11), 1 above log 11
    logits = torch.tensor([[0.0, math.log(3), -math.log(12), math.log(12)]])
    torch.testing.assert_close(make().eval().mask(logits), torch.tensor([[0.5, 0.8, 0.0, 1.0]]))


def test_the_penalty_is_the_chance_to_be_open() -> None:
    gate, a = make(penalty=1.0).train(), 0.4
    expected = 1 / (1 + math.exp(-(a - 2 / 3 * math.log(0.1 / 1.1))))
    assert gate.value_penalty(torch.tensor([[a]])).item() == pytest.approx(expected)
    torch.manual_seed(0)
    drawn = (gate.mask(torch.full((200, 500), a)) > 0).float().mean()
    assert drawn.item() == pytest.approx(expected, abs=0.005)


def test_masks_are_0_or_1_with_some_probability_and_drawn_for_every_row() -> None:
    torch.manual_seed(0)
    gate = make("field").train()
    mask = gate(torch.ones(4000, 3, 2))
    assert mask.shape == (4000, 3, 1)
    for end in (0, 1):
        assert 0.1 < (mask == end).float().mean() < 0.5
    assert mask.std(0).min() > 0.1
    assert gate.eval()(torch.ones(4000, 3, 2)).shape == (1, 3, 1)


def test_each_field_pays_in_slot_field() -> None:
    gate = make("field", penalty=0.5)
    open_share = 1 / (1 + math.exp(2 / 3 * math.log(0.1 / 1.1)))
    assert gate.penalty().item() == pytest.approx(3 * 0.5 * open_share)
    assert make("selection").penalty().item() == 0


def test_from_the_identity_noise_still_reaches_it() -> None:
    torch.manual_seed(0)
    gate = make("field", start="identity", penalty=0.0).train()
    gate(torch.ones(500, 3, 2)).sum().backward()
    assert gate.logits is not None
    assert gate.logits.grad is not None
    assert (gate.logits.grad > 0).all()
    assert gate.logits.min() > math.log(11)


def test_half_precision_draws_are_finite() -> None:
    torch.manual_seed(0)
    mask = make().train().bfloat16().mask(torch.zeros(500, 500, dtype=torch.bfloat16))
    assert mask.dtype == torch.bfloat16
    assert mask.isfinite().all()
