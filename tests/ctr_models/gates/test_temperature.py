from __future__ import annotations

import math

import torch

from ctr_models.gates import Gate, GateShape, GateSpec


def make(**options: object) -> Gate:
    torch.manual_seed(0)
    spec = GateSpec.parse({"name": "temperature", **options})
    return spec.build(GateShape(slot="attention", width=2, context=3, heads=2))


def test_the_query_and_the_number_of_keys_choose_the_temperature() -> None:
    gate = make()
    with torch.no_grad():
        gate.linear.weight.copy_(torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]))
        gate.length.copy_(torch.tensor([0.0, -50.0]).view(2, 1, 1))
    query = torch.tensor([[[0.0, math.atanh(0.5), 9.0]]])  # (1, 1, 3)
    scores = torch.tensor([1.0, 0.0, 0.0, 0.0, -torch.inf]).expand(1, 2, 1, 5)
    weights = gate.attend(scores, query)
    for head, tau in enumerate([1 + math.log(4) / 2, 1.5]):
        torch.testing.assert_close(weights[0, head, 0], (tau * scores[0, head, 0]).softmax(0))


def test_the_inverse_temperature_is_never_negative() -> None:
    gate = make()
    with torch.no_grad():
        gate.linear.weight.fill_(-100.0)
        gate.length.fill_(-100.0)
    assert gate.inverse(torch.ones(1, 1, 3), torch.tensor([[[[7]]]])).min() >= 0  # type: ignore[operator]


def test_absent_keys_leave_the_gradient_finite() -> None:
    gate = make()
    gate.attend(torch.tensor([1.0, 2.0, -torch.inf]).expand(1, 2, 1, 3), torch.ones(1, 1, 3))[
        ..., 0
    ].sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in gate.parameters())


def test_from_the_identity_any_length_starts_with_the_softmax() -> None:
    gate = make(start="identity")
    for keys in (1, 3, 50):
        scores = torch.randn(1, 2, 1, keys)
        torch.testing.assert_close(gate.attend(scores, torch.randn(1, 1, 3)), scores.softmax(-1))
