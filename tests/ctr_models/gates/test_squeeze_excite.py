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


def test_a_context_by_hand() -> None:
    """Two fields of means 1 and 3, a context of 2: z = (1, 3, 2)."""
    gate = GateSpec.parse({"name": "squeeze_excite", "context": "user"}).build(
        GateShape(slot="field", width=2, fields=2, context=1)
    )
    with torch.no_grad():
        gate.squeeze.weight.copy_(torch.tensor([[1.0, 1.0, -2.0], [0.0, 0.0, -1.0]]))  # relu(0), relu(-2)
        gate.excite.weight.copy_(torch.tensor([[1.0, 5.0], [-1.0, 5.0]]))
    x, context = torch.tensor([[[0.0, 2.0], [2.0, 4.0]]]), torch.tensor([[2.0]])
    assert gate(x, context).flatten().tolist() == [0.5, 0.5]
    # Without the context's 2 the first hidden unit is 4: sigmoid(4) and sigmoid(-4).
    torch.testing.assert_close(gate(x, 0 * context).flatten(), torch.tensor([0.9820138, 0.0179862]))
