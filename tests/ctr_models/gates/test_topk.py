from __future__ import annotations

import math

import pytest
import torch

from ctr_models.errors import ConfigError
from ctr_models.gates import Gate, GateShape, GateSpec
from ctr_models.gates.topk import keep_largest


def gate(choices: int = 4, **options: object) -> Gate:
    torch.manual_seed(0)
    shape = GateShape(slot="expert", width=4, choices=choices)
    return GateSpec.parse({"name": "topk", **options}).build(shape)


def test_by_hand() -> None:
    g = gate()
    g.load_state_dict({"linear.weight": torch.eye(4), "linear.bias": torch.zeros(4)})
    x = torch.tensor([[0.0, math.log(3), -5.0, -1.0]])
    torch.testing.assert_close(g(x), torch.tensor([[0.25, 0.75, 0.0, 0.0]]))


def test_left_out_is_exactly_zero() -> None:
    weights = gate(choices=6, k=3)(torch.randn(50, 4))
    assert ((weights > 0).sum(1) == 3).all()
    torch.testing.assert_close(weights.sum(1), torch.ones(50))


def test_with_all_kept_it_is_the_softmax() -> None:
    logits = torch.randn(7, 4)
    torch.testing.assert_close(keep_largest(logits, 4), logits.softmax(1))


def test_more_than_there_are_is_refused() -> None:
    with pytest.raises(ConfigError, match="5 of 4 experts can't be kept"):
        gate(k=5)


def test_it_does_not_claim_to_start_as_the_control() -> None:
    with pytest.raises(ConfigError, match="start"):
        gate(start="identity")
