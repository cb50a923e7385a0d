from __future__ import annotations

import math

import pytest
import torch

from ctr_models.gates import GateShape, GateSpec
from ctr_models.gates.annealed import AnnealedGate

LOGITS = torch.tensor([[1.0, 0.5, 0.0, -1.0]])


def make(**options: float) -> AnnealedGate:
    gate = GateSpec.parse({"name": "annealed", **options}).build(GateShape(slot="selection", width=2, fields=4))
    assert isinstance(gate, AnnealedGate)
    return gate


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


@pytest.mark.parametrize(("done", "t"), [(0.0, 1.0), (0.5, 10.0), (1.0, 100.0)])
def test_t_grows_exponentially(done: float, t: float) -> None:
    gate = make(sharpness=100)
    gate.anneal(done)
    expected = torch.tensor([[sigmoid(t * s) / sigmoid(0.5) for s in LOGITS[0].tolist()]])
    torch.testing.assert_close(gate.mask(LOGITS), expected)


def test_the_penalty_counts_every_value() -> None:
    gate, table = make(penalty=0.1, sharpness=100), torch.tensor([[0.2], [-0.3], [0.0]])
    torch.testing.assert_close(gate.value_penalty(table), torch.tensor(0.1 * (sigmoid(0.2) + sigmoid(-0.3) + 0.5)))
    gate.anneal(1.0)
    torch.testing.assert_close(gate.value_penalty(table), torch.tensor(0.1 * (sigmoid(20) + sigmoid(-30) + 0.5)))


def test_hardened_it_keeps_the_scale_of_what_it_keeps() -> None:
    gate = make(initial=0.5)
    gate.harden()
    scale = 1 / sigmoid(0.5)
    torch.testing.assert_close(gate.mask(LOGITS), torch.tensor([[scale, scale, 0.0, 0.0]]))
    assert gate.bound == pytest.approx(scale)


def test_the_hard_mask_is_where_annealing_leads() -> None:
    gate, logits = make(sharpness=10_000), torch.tensor([[0.01, -0.01, 2.0, -2.0]])
    gate.anneal(1.0)
    soft = gate.mask(logits)
    gate.harden()
    torch.testing.assert_close(soft, gate.mask(logits), rtol=0, atol=1e-6)
