from __future__ import annotations

import torch

from kernels import gated_cross


def test_it_is_the_equation() -> None:
    c0, crossed, c, gate = torch.randn(4, 5, 3, dtype=torch.float64)
    torch.testing.assert_close(gated_cross(c0, crossed, c, gate), c0 * crossed * gate + c)


def test_without_a_gate_it_is_the_cross_layer_of_dcnv2() -> None:
    c0, crossed, c = torch.randn(3, 5, 3)
    assert torch.equal(gated_cross(c0, crossed, c), gated_cross(c0, crossed, c, torch.ones(1, 3)))


def test_gradients() -> None:
    values = tuple(torch.randn(3, 2, dtype=torch.float64, requires_grad=True) for _ in range(4))
    assert torch.autograd.gradcheck(gated_cross, values)
