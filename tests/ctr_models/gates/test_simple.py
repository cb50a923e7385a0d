from __future__ import annotations

import torch

from ctr_models.gates import GateShape, GateSpec


def test_it_is_a_product_of_two_linear_maps() -> None:
    gate = GateSpec(name="simple").build(GateShape(slot="feature", width=2))
    with torch.no_grad():
        gate.linear.weight.copy_(torch.tensor([[0.0, 1.0], [2.0, 0.0]]))
        gate.linear.bias.copy_(torch.tensor([1.0, -1.0]))
    # x = (3, 5): mask (5 + 1, 6 - 1), gated (3 * 6, 5 * 5)
    torch.testing.assert_close(gate.gated(torch.tensor([[3.0, 5.0]])), torch.tensor([[18.0, 25.0]]))
