from __future__ import annotations

import torch

from ctr_models.gates import GateShape, GateSpec


def test_it_is_the_sigmoid_of_a_linear_map_without_bias() -> None:
    gate = GateSpec(name="sigmoid").build(GateShape(slot="cross", width=4, context=3))
    c = torch.randn(5, 3)
    assert [n for n, _ in gate.named_parameters()] == ["linear.weight"]
    torch.testing.assert_close(gate(torch.randn(5, 4), c), torch.sigmoid(c @ gate.linear.weight.T))


def test_without_a_context_x_decides() -> None:
    gate, x = GateSpec(name="sigmoid").build(GateShape(slot="attention", width=4)), torch.randn(5, 2, 3, 4)
    torch.testing.assert_close(gate(x), torch.sigmoid(x @ gate.linear.weight.T))


def test_a_context_serves_all_heads_and_positions() -> None:
    gate = GateSpec(name="sigmoid").build(GateShape(slot="attention", width=4, context=3))
    assert gate(torch.randn(5, 2, 6, 4), torch.randn(5, 3)).shape == (5, 1, 1, 4)
