from __future__ import annotations

import math

import pytest
import torch

from ctr_models.errors import ConfigError
from ctr_models.gates import GateShape, GateSpec


def test_the_other_stream_amplifies() -> None:
    gate = GateSpec(name="cross_stream").build(GateShape(slot="fusion", width=1, context=2))
    with torch.no_grad():
        gate.linear.weight.copy_(torch.tensor([[1.0, -1.0]]))
    x, y = torch.tensor([[2.0], [-2.0], [2.0]]), torch.tensor([[1.0, 1.0], [math.log(3), 0.0], [-90.0, 0.0]])
    # sigmoid(0) = 1/2, sigmoid(log 3) = 3/4, sigmoid(-90) = 0
    torch.testing.assert_close(gate.gated(x, y), torch.tensor([[3.0], [-3.5], [2.0]]))


def test_it_cannot_begin_as_the_control() -> None:
    with pytest.raises(ConfigError, match="start"):
        GateSpec.parse({"name": "cross_stream", "start": "identity"})
