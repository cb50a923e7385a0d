from __future__ import annotations

import torch

from ctr_models.gates import SLOTS, GateShape, GateSpec, NoGate


def test_it_returns_its_input_itself_in_every_slot() -> None:
    for slot in NoGate.slots:
        gate, x = GateSpec(name="none").build(GateShape(slot=slot, width=4)), torch.randn(2, 3, 4)  # type: ignore[arg-type]
        assert gate.gated(x) is x
        assert not list(gate.parameters())


def test_there_is_a_control_for_every_slot() -> None:
    assert NoGate.slots == set(SLOTS)


def test_experts_share_alike() -> None:
    gate = GateSpec(name="none").build(GateShape(slot="expert", width=4, choices=5))
    assert torch.equal(gate(torch.randn(3, 4)), torch.full((3, 5), 0.2))


def test_treatments_go_by_their_logits() -> None:
    gate, logits = GateSpec(name="none").build(GateShape(slot="interaction", width=3, choices=3)), torch.randn(4, 3)
    assert torch.equal(gate(logits), logits.softmax(1))


def test_every_layer_is_passed() -> None:
    gate = GateSpec(name="none").build(GateShape(slot="depth", width=4))
    assert torch.equal(gate(torch.randn(3, 4)).expand(3, 1), torch.ones(3, 1))
