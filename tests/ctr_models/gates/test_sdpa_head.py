from __future__ import annotations

import pytest
import torch

from ctr_models.gates import GateShape, GateSpec

SHAPE = GateShape(slot="attention", width=2, context=3, heads=2)


def test_it_is_one_sigmoid_a_head_and_position() -> None:
    gate = GateSpec(name="sdpa_head").build(SHAPE)
    with torch.no_grad():
        gate.linear.weight.copy_(torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]]))
    x, layer_input = torch.ones(1, 2, 2, 2), torch.tensor([[[0.0, 1.0, 9.0], [1.0, -1.0, 9.0]]])
    expected = torch.sigmoid(torch.tensor([[0.0, 1.0], [2.0, -2.0]]))  # (H, L)
    assert gate(x, layer_input).shape == (1, 2, 2, 1)
    torch.testing.assert_close(gate(x, layer_input)[0, :, :, 0], expected)
    torch.testing.assert_close(gate.gated(2 * x, layer_input)[0, :, :, 1], 2 * expected)


def test_without_a_context_the_heads_decide() -> None:
    gate = GateSpec(name="sdpa_head").build(GateShape(slot="attention", width=2, heads=2))
    x = torch.randn(3, 2, 5, 2)
    side_by_side = torch.cat([x[:, 0], x[:, 1]], dim=2)  # (B, L, H D)
    expected = torch.sigmoid(side_by_side @ gate.linear.weight.T)  # (B, L, H)
    torch.testing.assert_close(gate(x).squeeze(3), expected.transpose(1, 2))


@pytest.mark.parametrize(("start", "bound"), [("paper", 1.0), ("identity", 2.0)])
def test_the_bound_goes_with_the_start(start: str, bound: float) -> None:
    gate = GateSpec.parse({"name": "sdpa_head", "start": start}).build(SHAPE)
    with torch.no_grad():
        gate.linear.weight.fill_(100.0)
    assert gate(torch.ones(1, 2, 1, 2), torch.ones(1, 1, 3)).max() == gate.bound == bound
