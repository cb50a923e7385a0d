from __future__ import annotations

import pytest
import torch

from ctr_models.errors import ConfigError
from ctr_models.gates import GateShape, GateSpec


def test_it_looks_at_the_mean_of_each_field() -> None:
    gate = GateSpec(name="squeeze_excite").build(GateShape(slot="field", width=4, fields=6))
    x = torch.randn(5, 6, 4)
    z = torch.relu(x.mean(2) @ gate.squeeze.weight.T)
    torch.testing.assert_close(gate(x), torch.sigmoid(z @ gate.excite.weight.T).unsqueeze(2))
    torch.testing.assert_close(gate(x), gate(x.mean(2, keepdim=True).expand_as(x)))


@pytest.mark.parametrize(("fields", "reduction", "hidden"), [(30, 3, 10), (30, 10, 3), (4, 3, 2)])
def test_the_hidden_layer_is_a_fraction_of_the_fields(fields: int, reduction: int, hidden: int) -> None:
    spec = GateSpec.parse({"name": "squeeze_excite", "reduction": reduction})
    gate = spec.build(GateShape(slot="field", width=4, fields=fields))
    assert tuple(gate.squeeze.weight.shape) == (hidden, fields)


def test_a_context_joins_the_look() -> None:
    spec = GateSpec.parse({"name": "squeeze_excite", "context": "user"})
    gate = spec.build(GateShape(slot="field", width=4, fields=6, context=3))
    x = torch.randn(1, 6, 4).expand(5, -1, -1)
    assert gate(x, torch.randn(5, 3)).std(dim=0).max() > 0
    with pytest.raises(ConfigError, match="has to be supplied by the model"):
        spec.build(GateShape(slot="field", width=4, fields=6))
