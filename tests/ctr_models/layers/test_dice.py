from __future__ import annotations

import copy

import pytest
import torch

from ctr_models.layers.dice import Dice


def test_it_is_its_equation_on_the_statistics_of_the_batch() -> None:
    torch.manual_seed(0)
    s = 3 + 2 * torch.randn(50, 4, dtype=torch.float64)
    dice = Dice(4).double()
    torch.nn.init.normal_(dice.alpha)
    p = torch.sigmoid((s - s.mean(0)) / (s.var(0, correction=0) + 1e-8).sqrt())
    torch.testing.assert_close(dice(s), p * s + (1 - p) * dice.alpha * s)


def test_gradients() -> None:
    torch.manual_seed(0)
    dice, s = Dice(3).double(), torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    alpha = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda s, alpha: torch.func.functional_call(copy.deepcopy(dice), {"alpha": alpha}, s), (s, alpha)
    )


def test_evaluation_uses_moving_averages_that_training_moves() -> None:
    torch.manual_seed(0)
    dice, s = Dice(4), 3 + 2 * torch.randn(1000, 4)
    for _ in range(100):
        dice(s)
    torch.testing.assert_close(dice.mean, s.mean(0), rtol=1e-3, atol=0)
    torch.testing.assert_close(dice.variance, s.var(0), rtol=1e-3, atol=0)
    dice.eval()
    torch.testing.assert_close(dice(s[:1]), dice(s)[:1])
    before = dice.mean.clone()
    dice(s + 1)
    assert torch.equal(dice.mean, before)


@pytest.mark.parametrize("rows", [0, 1])
def test_a_batch_without_variance_leaves_the_statistics_alone(rows: int) -> None:
    dice = Dice(4)
    torch.testing.assert_close(dice(torch.ones(rows, 4)), copy.deepcopy(dice).eval()(torch.ones(rows, 4)))
    assert torch.equal(dice.mean, torch.zeros(4))
    assert torch.equal(dice.variance, torch.ones(4))


def test_bfloat16_keeps_statistics_in_float32() -> None:
    torch.manual_seed(0)
    s = 100 + torch.randn(1000, 4)
    dice, rough = Dice(4), Dice(4)
    dice(s)
    rough(s.bfloat16())
    assert rough.mean.dtype == torch.float32
    torch.testing.assert_close(rough.mean, dice.mean, rtol=0.01, atol=0)
