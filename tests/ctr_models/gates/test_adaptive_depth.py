from __future__ import annotations

import pytest
import torch

from ctr_models.errors import ConfigError
from ctr_models.gates import GateShape, GateSpec

SHAPE = GateShape(slot="depth", width=2, context=1)


def test_layer_and_doubt_decide() -> None:
    gate = GateSpec(name="adaptive_depth").build(SHAPE)
    with torch.no_grad():
        gate.linear.weight.copy_(torch.tensor([[1.0, 2.0, 3.0]]))
        gate.linear.bias.fill_(-1.0)
    on = gate(torch.tensor([[1.0, 1.0], [0.0, 0.5]]), torch.tensor([[1.0], [0.0]]))
    torch.testing.assert_close(on, torch.sigmoid(torch.tensor([[5.0], [0.0]])))


def test_without_a_doubt_the_layer_decides() -> None:
    gate = GateSpec(name="adaptive_depth").build(GateShape(slot="depth", width=2))
    x = torch.randn(3, 2)
    torch.testing.assert_close(gate(x), torch.sigmoid(x @ gate.linear.weight.T + gate.linear.bias))


def test_from_the_identity_every_row_goes_on() -> None:
    gate = GateSpec.parse({"name": "adaptive_depth", "start": "identity", "confidence": 0.9}).build(SHAPE)
    torch.testing.assert_close(gate(torch.randn(5, 2), torch.rand(5, 1)), torch.full((5, 1), 0.9))


@pytest.mark.parametrize("confidence", [0.5, 1.0])
def test_a_start_that_would_not_go_on_is_refused(confidence: float) -> None:
    with pytest.raises(ConfigError, match="^confidence: must be"):
        GateSpec.parse({"name": "adaptive_depth", "confidence": confidence})


def test_it_decides_when_the_exits_are_warm() -> None:
    gate = GateSpec.parse({"name": "adaptive_depth", "warm": 0.3}).build(SHAPE)
    x, doubt = torch.randn(5, 2), torch.rand(5, 1)
    decided = gate(x, doubt)
    gate.anneal(0.0)
    assert torch.equal(gate(x, doubt), torch.full((5, 1), 0.5))
    assert gate.state_dict()["decides"].item() is False
    gate.anneal(0.3)
    assert torch.equal(gate(x, doubt), decided)
