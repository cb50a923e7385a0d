from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ctr_models.gates import GATES, Gate, GateConfig, GateShape, GateSpec, SelectionGate, register_gate

SELECTING = sorted(n for n in GATES if issubclass(GATES[n], SelectionGate) and "selection" in GATES[n].slots)


def make(name: str, **options: object) -> SelectionGate:
    gate = GateSpec.parse({"name": name, **options}).build(GateShape(slot="selection", width=4, fields=3))
    assert isinstance(gate, SelectionGate)
    return gate


@pytest.mark.parametrize("name", SELECTING)
def test_a_value_begins_open_where_the_gate_starts_as_the_identity(name: str) -> None:
    gate = make(name, start="identity").eval()
    logits = torch.full((2, 3), gate.initial_logit)
    torch.testing.assert_close(gate.mask(logits), torch.ones(2, 3), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", SELECTING)
def test_hardened_it_keeps_the_larger_logits(name: str) -> None:
    gate, logits = make(name).eval(), torch.linspace(-8, 8, 401).view(1, -1)
    gate.harden()
    assert 0 < gate.kept(logits).float().mean() < 1
    assert (gate.mask(logits).diff() >= 0).all()


@pytest.mark.parametrize("name", SELECTING)
def test_the_price_falls_with_the_logits_and_ends_with_the_search(name: str) -> None:
    gate, table = make(name, penalty=0.5), torch.zeros(10, 1, requires_grad=True)
    price = gate.value_penalty(table)
    price.backward()
    assert 0 < price.item() < 5
    assert (table.grad > 0).all()
    gate.harden()
    assert gate.value_penalty(table).item() == 0


@pytest.mark.parametrize("name", SELECTING)
def test_vectors_may_be_of_no_width(name: str) -> None:
    logits = torch.randn(1, 50)
    assert make(name)(torch.zeros(1, 50, 0), logits).shape == (1, 50, 1)


def test_it_needs_logits() -> None:
    with pytest.raises(ValueError, match="needs the logits"):
        make("annealed")(torch.ones(2, 3, 4))


def test_a_gate_of_ones_own_needs_two_methods() -> None:
    @register_gate("above")
    class Above(SelectionGate):
        def __init__(self, config: GateConfig, shape: GateShape) -> None:
            super().__init__(config, shape)
            self.register_buffer("hardened", torch.tensor(False))

        def mask(self, logits: Tensor) -> Tensor:
            return self.kept(logits).to(logits.dtype)

        def kept(self, logits: Tensor) -> Tensor:
            return logits > 0

    gate: Gate = make("above")
    mask = gate(torch.ones(1, 3, 4), torch.tensor([[1.0, -1.0, -2.0]]))
    assert mask.flatten().tolist() == [1, 0, 0]
    assert gate.telemetry(mask)["zeros"] == pytest.approx(2 / 3)
    assert float(make("above").value_penalty(torch.ones(5))) == 0
