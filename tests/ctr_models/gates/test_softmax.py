from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError

from ctr_models.errors import ConfigError
from ctr_models.gates import GateShape, GateSpec
from ctr_models.gates.softmax import SoftmaxConfig, SoftmaxGate


def gate(**options: object) -> SoftmaxGate:
    """W x = x: the row itself is the logits of two experts."""
    built = GateSpec.parse({"name": "softmax", **options}).build(GateShape(slot="expert", width=2, choices=2))
    built.load_state_dict({"linear.weight": torch.eye(2), "linear.bias": torch.zeros(2)})
    assert isinstance(built, SoftmaxGate)
    return built


def test_by_hand() -> None:
    x = torch.tensor([[0.0, math.log(3)]])
    torch.testing.assert_close(gate()(x), torch.tensor([[0.25, 0.75]]))
    torch.testing.assert_close(gate(temperature=0.5)(x), torch.tensor([[0.1, 0.9]]))


def test_the_activation_comes_before_the_temperature() -> None:
    x = torch.randn(5, 2)
    found = gate(activation="tanh", temperature=0.25)(x)
    torch.testing.assert_close(found, (torch.tanh(x) / 0.25).softmax(1))


def test_in_slot_interaction_the_logits_are_the_models() -> None:
    pairs = GateSpec.parse({"name": "softmax", "temperature": 2}).build(
        GateShape(slot="interaction", width=3, choices=3)
    )
    logits = torch.randn(4, 3)
    assert not list(pairs.parameters())
    torch.testing.assert_close(pairs(logits), (logits / 2).softmax(1))


@pytest.mark.parametrize("option", [{"temperature": 2}, {"activation": "tanh"}])
def test_in_slot_interaction_other_logits_are_no_identity(option: dict[str, object]) -> None:
    spec = GateSpec.parse({"name": "softmax", "start": "identity", **option})
    spec.build(GateShape(slot="expert", width=3, choices=3))
    with pytest.raises(ConfigError, match="weights are not those of gate none. use start: paper"):
        spec.build(GateShape(slot="interaction", width=3, choices=3))


def test_relu_is_no_activation_here() -> None:
    with pytest.raises(ValidationError):
        SoftmaxConfig(activation="relu")  # type: ignore[arg-type]
