from __future__ import annotations

import pytest
import torch

from ctr_models.errors import ConfigError
from ctr_models.gates import Gate, GateShape, GateSpec


def gate(context: int = 0, slot: str = "feature", **options: object) -> Gate:
    torch.manual_seed(0)
    shape = GateShape(slot=slot, width=6, context=context, fields=5)  # type: ignore[arg-type]
    return GateSpec.parse({"name": "sigmoid2", **options}).build(shape)


def test_it_is_twice_the_sigmoid_of_a_perceptron() -> None:
    g, c = gate(context=3, hidden=[4]), torch.randn(7, 3)
    first, _, last = g.mlp  # type: ignore[misc]
    logits = torch.relu(c @ first.weight.T + first.bias) @ last.weight.T + last.bias
    torch.testing.assert_close(g(torch.randn(7, 6), c), 2 / (1 + torch.exp(-logits)))


def test_a_learned_context_is_alive_from_the_first_step() -> None:
    """The official code starts it at zero under ReLU and zero biases: only the last bias ever learns."""
    g = gate(hidden=[8, 8])
    g.gated(torch.randn(4, 6)).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in g.parameters())
    assert "learned" in dict(g.named_parameters())


def test_a_learned_context_gives_one_mask_for_all_rows() -> None:
    assert gate()(torch.randn(9, 6)).shape == (1, 6)
    assert gate(slot="field")(torch.randn(9, 5, 6)).shape == (1, 5, 1)


def test_self_decides_row_by_row() -> None:
    g = GateSpec.parse({"name": "sigmoid2", "context": "self"}).build(GateShape(slot="feature", width=6))
    assert g(torch.randn(9, 6)).shape == (9, 6)
    g = GateSpec.parse({"name": "sigmoid2", "context": "self"}).build(GateShape(slot="field", width=6, fields=5))
    assert g(torch.randn(9, 5, 6)).shape == (9, 5, 1)


def test_without_hidden_layers_it_is_linear() -> None:
    assert len(gate(context=3, hidden=[]).mlp) == 1  # type: ignore[arg-type]


def test_a_context_that_nobody_supplies_is_refused() -> None:
    with pytest.raises(ConfigError, match="context 'user' has to be supplied by the model"):
        GateSpec.parse({"name": "sigmoid2", "context": "user"}).build(GateShape(slot="feature", width=6))
