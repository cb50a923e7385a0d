from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from ctr_models import CTRModel, IdField, Schema, create_model, example_batch
from ctr_models.errors import ConfigError

SCHEMA = Schema.of({"user": 12, "item": 9, "hour": 5}, dim=4)


def make(**options: Any) -> CTRModel:
    torch.manual_seed(0)
    options = {"attention_layers": 3, "heads": 2, "width": 6} | options
    return create_model("autoint", SCHEMA, embedding_std=0.5, **options).eval()


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("residual", [True, False])
def test_it_is_its_equation(residual: bool, layer_norm: bool) -> None:
    model, batch = make(residual=residual, layer_norm=layer_norm), example_batch(SCHEMA, rows=5)
    x = model.inputs.embedding(batch).stacked()
    for layer in model.layers:
        attended = layer.attention(x)
        if residual:
            attended = attended + (x if x.shape[2] == 6 else x @ layer.residual.weight.T)
        x = F.layer_norm(attended, (6,)).relu() if layer_norm else attended.relu()
    torch.testing.assert_close(model(batch), x.flatten(1) @ model.head.weight[0] + model.head.bias)


def test_each_layer_has_its_own_residual() -> None:
    """With attention that gives nothing, x_L = relu(R_0 e), not zero."""
    model, batch = make(), example_batch(SCHEMA, rows=5)
    with torch.no_grad():
        for layer in model.layers:
            layer.attention.value.weight.zero_()
    x = (model.inputs.embedding(batch).stacked() @ model.layers[0].residual.weight.T).relu()
    torch.testing.assert_close(model(batch), model.head(x.flatten(1)).squeeze(1))
    assert x.abs().max() > 0


def test_autoint_plus_adds_the_perceptron_and_the_linear_term() -> None:
    plain, batch = make(), example_batch(SCHEMA, rows=5)
    plus = make(mlp={"hidden": [8]}, linear=True)
    plus.load_state_dict(plain.state_dict(), strict=False)
    deep = plus.mlp(plus.inputs.embedding(batch).flat).squeeze(1)
    torch.testing.assert_close(plus(batch), plain(batch) + deep + plus.linear(batch))


def test_parameters_of_the_interaction_do_not_depend_on_the_number_of_fields() -> None:
    """L d d' H in the paper: three projections a layer, and the first residual's."""
    expected = 3 * 4 * 6 + 4 * 6 + 2 * (3 * 6 * 6)
    assert sum(p.numel() for p in make().layers.parameters()) == expected
    more = Schema.of({f"c{i}": 3 for i in range(9)}, dim=4)
    model = create_model("autoint", more, attention_layers=3, heads=2, width=6)
    assert sum(p.numel() for p in model.layers.parameters()) == expected


def test_every_layer_has_its_gate() -> None:
    model = make(gates={"attention": "sigmoid"})
    assert [(layer.attention.gate.shape.depth, layer.attention.gate.shape.context) for layer in model.layers] == [
        (0, 4),
        (1, 6),
        (2, 6),
    ]
    told = model.telemetry(example_batch(SCHEMA, rows=5))
    assert {f"layers.{i}.attention.gate" for i in range(3)} <= set(told)


def test_unequal_dimensions_are_refused() -> None:
    uneven = Schema(sparse=(IdField(name="a", rows=3, dim=4), IdField(name="b", rows=3, dim=8)))
    with pytest.raises(ConfigError, match=r"autoint needs fields of one dimension, found {'a': 4, 'b': 8}"):
        create_model("autoint", uneven)


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"model.heads: 4 heads don't divide a width of 6"):
        make(heads=4)
