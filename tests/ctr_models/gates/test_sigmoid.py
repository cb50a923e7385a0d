from __future__ import annotations

import pytest
import torch

from ctr_models.gates import Gate, GateShape, GateSpec


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


@pytest.mark.parametrize("start", ["paper", "identity"])
@pytest.mark.parametrize("fused", [True, False])
def test_a_whole_cross_layer_is_that_of_its_parts(start: str, fused: bool) -> None:
    gate = GateSpec.parse({"name": "sigmoid", "start": start}).build(GateShape(slot="cross", width=20, context=20))
    gate.fused = fused
    layer = torch.nn.Linear(20, 20)
    c0, c = (torch.randn(50, 20, requires_grad=True) for _ in range(2))
    leaves = [c0, c, layer.weight, layer.bias, gate.linear.weight]
    whole, parts = gate.cross(c0, c, layer), Gate.cross(gate, c0, c, layer)
    torch.testing.assert_close(whole, parts)
    for one, other in zip(*(torch.autograd.grad(out.sin().sum(), leaves) for out in (whole, parts)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_fused_cross_layer_calls_its_operator() -> None:
    gate = GateSpec(name="sigmoid").build(GateShape(slot="cross", width=4, context=4))
    out = gate.cross(torch.randn(3, 4), torch.randn(3, 4), torch.nn.Linear(4, 4))
    assert type(out.grad_fn).__name__ == "_FastBackward"
