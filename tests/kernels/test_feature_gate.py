from __future__ import annotations

import pytest
import torch

from kernels import feature_gate


@pytest.mark.parametrize("rows", [1, 4])
def test_it_is_the_equation(rows: int) -> None:
    x, logits = torch.randn(4, 6, dtype=torch.float64), torch.randn(rows, 6, dtype=torch.float64)
    torch.testing.assert_close(feature_gate(x, logits), 2 / (1 + torch.exp(-logits)) * x)


def test_zero_logits_change_nothing() -> None:
    x = torch.randn(4, 6)
    assert torch.equal(feature_gate(x, torch.zeros(1, 6)), x)


def test_one_value_a_field() -> None:
    x, logits = torch.ones(2, 3, 4), torch.tensor([-100.0, 0.0, 100.0]).view(1, 3, 1)
    assert feature_gate(x, logits).sum(2).tolist() == [[0, 4, 8], [0, 4, 8]]


@pytest.mark.parametrize("rows", [1, 3])
def test_gradients(rows: int) -> None:
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    logits = torch.randn(rows, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(feature_gate, (x, logits))
