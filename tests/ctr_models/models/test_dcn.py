from __future__ import annotations

import pytest
import torch

from ctr_models import Schema, create_model, example_batch

SCHEMA = Schema.of({"user": 12, "item": 9, "hour": 5}, dim=4)


@pytest.mark.parametrize("gate", ["none", "sigmoid"])
def test_it_is_its_equation(gate: str) -> None:
    torch.manual_seed(0)
    model = create_model(
        "dcn", SCHEMA, embedding_std=0.5, cross_layers=2, mlp={"hidden": [8, 6]}, gates={"cross": gate}
    ).eval()
    batch = example_batch(SCHEMA, rows=7)
    c0 = c = model.inputs.embedding(batch).flat
    for crossing, bias, g in zip(model.cross.linears, model.cross.biases, model.cross.gates, strict=True):
        mask = torch.sigmoid(c @ g.linear.weight.T) if gate == "sigmoid" else 1
        c = c0 * (c @ crossing.weight[0]).unsqueeze(1) * mask + bias + c
    torch.testing.assert_close(model(batch), model.head(torch.cat([c, model.mlp(c0)], dim=1)).squeeze(1))


def test_parameter_count() -> None:
    d, rows = 12, 26
    model = create_model("dcn", SCHEMA, cross_layers=3, mlp={"hidden": [8]})
    assert sum(p.numel() for p in model.parameters()) == 4 * rows + 3 * 2 * d + (d * 8 + 8) + (d + 8 + 1)
