from __future__ import annotations

import copy

import torch

from ctr_models.gates import Gate, GateShape, GateSpec
from ctr_models.layers.teacher import Teacher

SHAPE = GateShape(slot="expert", width=3, context=4, choices=2)
OFFSETS = torch.tensor([0, 2, 2, 5])
INPUTS = (torch.randn(5, 4), OFFSETS, torch.randn(3, 4))


def make(seed: int) -> Gate:
    torch.manual_seed(seed)
    return GateSpec(name="attention_weighted").build(SHAPE)


def test_it_begins_as_the_gate_and_averages_its_weights() -> None:
    gate, later = make(0), make(1)
    teacher = Teacher(gate, decay=0.75)
    expected = {n: w.detach().clone() for n, w in gate.named_parameters()}
    torch.testing.assert_close(list(teacher.buffers()), list(expected.values()))
    for _ in range(3):
        teacher.update(later)
        expected = {n: 0.75 * w + 0.25 * later.get_parameter(n).detach() for n, w in expected.items()}
    torch.testing.assert_close(list(teacher.buffers()), list(expected.values()))


def test_its_attention_is_that_of_a_gate_with_the_averaged_weights() -> None:
    gate, later = make(0), make(1)
    teacher = Teacher(gate, decay=0.5)
    teacher.update(later)
    averaged = copy.deepcopy(gate)
    with torch.no_grad():
        for name, weight in averaged.named_parameters():
            weight.copy_(0.5 * gate.get_parameter(name) + 0.5 * later.get_parameter(name))
        before = gate.attention(*INPUTS)
        torch.testing.assert_close(teacher(gate, *INPUTS), averaged.attention(*INPUTS))
        assert torch.equal(gate.attention(*INPUTS), before)
    assert not torch.equal(teacher(gate, *INPUTS), before)


def test_it_stands_in_buffers_and_does_not_learn() -> None:
    gate = make(0)
    teacher = Teacher(gate, decay=0.5)
    assert list(teacher.parameters()) == []
    assert list(teacher.modules()) == [teacher]  # the gate is not a part of it
    found = teacher(gate, *(x.clone().requires_grad_(x.is_floating_point()) for x in INPUTS))
    assert not found.requires_grad
    again = Teacher(make(1), decay=0.5)
    again.load_state_dict(teacher.state_dict())
    assert torch.equal(again(gate, *INPUTS), found)
