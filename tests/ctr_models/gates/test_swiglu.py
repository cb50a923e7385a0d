from __future__ import annotations

import math

import pytest
import torch

from ctr_models.gates import GateShape, GateSpec


def test_one_coordinate_by_hand() -> None:
    gate = GateSpec(name="swiglu").build(GateShape(slot="feature", width=1))
    with torch.no_grad():
        gate.linear.weight.fill_(2.0)
        gate.linear.bias.fill_(-1.0)
    # z = 2 * 1.5 - 1 = 2; SiLU(2) = 2 / (1 + e^-2) = 1.7616; gated 1.5 * 1.7616
    assert gate.gated(torch.tensor([[1.5]])).item() == pytest.approx(1.5 * 2 / (1 + math.exp(-2)))
    # z = -1: the mask is negative
    assert gate(torch.tensor([[0.0]])).item() == pytest.approx(-1 / (1 + math.e))
