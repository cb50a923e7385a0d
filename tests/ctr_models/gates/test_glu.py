from __future__ import annotations

import pytest
import torch

from ctr_models.errors import ConfigError
from ctr_models.gates import GATES, Gate, GateShape, GateSpec
from ctr_models.gates.glu import GLUGate

UNITS = sorted(name for name in GATES if issubclass(GATES[name], GLUGate))


def make(name: str, *, context: int = 0) -> Gate:
    return GateSpec(name=name).build(GateShape(slot="feature", width=2, context=context))


def test_there_is_one_an_activation() -> None:
    assert UNITS == ["geglu", "simple", "swiglu"]


@pytest.mark.parametrize("name", UNITS)
def test_the_activation_is_1_where_the_bias_starts(name: str) -> None:
    gate = GATES[name]
    assert issubclass(gate, GLUGate)
    one = torch.tensor(gate.one, dtype=torch.float64)
    torch.testing.assert_close(gate.activation(one), torch.ones_like(one), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", UNITS)
def test_fresh_embeddings_pass_as_they_are(name: str) -> None:
    x = 1e-4 * torch.randn(50, 2)
    torch.testing.assert_close(make(name).gated(x), x, rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", UNITS)
def test_a_context_decides_in_place_of_x(name: str) -> None:
    gate, x, context = make(name, context=3), torch.randn(4, 2), torch.randn(4, 3)
    torch.testing.assert_close(gate(x, context), gate(-x, context))
    assert not torch.allclose(gate(x, context), gate(x, -context))


@pytest.mark.parametrize("name", UNITS)
def test_a_context_that_the_model_does_not_give_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="context 'user' has to be supplied by the model"):
        GateSpec.parse({"name": name, "context": "user"}).build(GateShape(slot="feature", width=2))


@pytest.mark.parametrize("name", UNITS)
def test_a_mask_without_bounds_is_told_as_if_it_ended_at_0_and_2(name: str) -> None:
    told = make(name).telemetry(torch.tensor([[1.0, 1.0], [-7.0, 50.0]]))
    assert told["mean"] == pytest.approx(45 / 4)
    assert told["saturation"] == 0.5  # -7 and 50
    assert told["entropy"] == pytest.approx(0.5, abs=1e-4)  # one bit each for the two in the middle
