from __future__ import annotations

import pytest
import torch

from ctr_models.errors import ConfigError
from ctr_models.gates import GateShape, GateSpec
from ctr_models.gates.recursive import RecursiveGate


def make(width: int = 8, context: int = 0, **options: object) -> RecursiveGate:
    torch.manual_seed(0)
    gate = GateSpec.parse({"name": "recursive", **options}).build(
        GateShape(slot="cross", width=width, context=context)
    )
    assert isinstance(gate, RecursiveGate)
    return gate


def test_one_number_wide_it_can_be_done_by_hand() -> None:
    gate = make(width=1, order=2, alpha=2.0)
    with torch.no_grad():
        gate.inputs.weight.copy_(torch.tensor([[1.0], [2.0], [3.0]]))  # p_0, q_0, q_1
        gate.inputs.bias.zero_()
        gate.steps[0].weight.fill_(5.0)
        gate.output.weight.fill_(0.1)
    # c = 2: p_1 = 4 * 2 / 2 = 4; p_2 = 6 * (5 * 4) / 2 = 60; sigmoid(6)
    torch.testing.assert_close(gate(torch.tensor([[2.0]])), torch.sigmoid(torch.tensor([[6.0]])))


def test_the_order_grows_with_each_step() -> None:
    """Without the biases, c twice as large makes logits 2^(n + 1) times as large."""
    for order in (1, 2, 3, 4):
        gate, c = make(order=order).double(), torch.randn(5, 8, dtype=torch.float64)
        with torch.no_grad():
            gate.inputs.bias.zero_()
        torch.testing.assert_close(gate(2 * c).logit(), 2 ** (order + 1) * gate(c).logit())


def test_it_starts_linear_near_zero() -> None:
    gate = make(order=4)
    with torch.no_grad():
        gate.inputs.bias[gate.widths[0] :].fill_(gate.config.alpha)
        c = torch.full((1, 8), 1e-4)
        logits = torch.logit(gate(c).double())
        assert logits.abs().max() > 1e-6
        torch.testing.assert_close(torch.logit(gate(2 * c).double()), 2 * logits, rtol=0.05, atol=1e-6)


@pytest.mark.parametrize(("width", "order", "widths"), [(8, 3, [2, 4, 8]), (3, 4, [1, 1, 1, 3]), (6, 1, [6])])
def test_the_widths_double(width: int, order: int, widths: list[int]) -> None:
    gate = make(width=width, order=order)
    assert gate.widths == widths
    assert gate(torch.ones(2, width)).shape == (2, width)


def test_a_context_decides_alone() -> None:
    gate, c = make(context=3), torch.randn(4, 3)
    assert torch.equal(gate(torch.randn(4, 8), c), gate(torch.randn(4, 8), c))


def test_a_wrong_option_is_named() -> None:
    with pytest.raises(ConfigError, match="^order: must be at least 1"):
        make(order=0)
