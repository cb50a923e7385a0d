from __future__ import annotations

import math

import pytest
import torch

from ctr_models.gates import GateShape, GateSpec


def test_one_coordinate_by_hand() -> None:
    gate = GateSpec(name="geglu").build(GateShape(slot="feature", width=1))
    with torch.no_grad():
        gate.linear.weight.fill_(2.0)
        gate.linear.bias.fill_(-1.0)
    # z = 2 * 1.5 - 1 = 2; GELU(2) = 2 P(N(0, 1) < 2) = 2 * 0.97725; gated 1.5 * 1.9545
    assert gate.gated(torch.tensor([[1.5]])).item() == pytest.approx(1.5 * 2 * 0.977249868)
    assert gate(torch.tensor([[0.0]])).item() == pytest.approx(-(1 + math.erf(-1 / math.sqrt(2))) / 2)
