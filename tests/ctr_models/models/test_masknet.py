from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ctr_models import CTRModel, IdField, Schema, create_model, example_batch
from ctr_models.errors import ConfigError
from ctr_models.models.masknet import FieldNorm, MaskBlock

SCHEMA = Schema.of({"user": 12, "item": 9, "hour": 5}, dim=4)
UNEVEN = Schema(sparse=(IdField(name="a", rows=3, dim=4), IdField(name="b", rows=3, dim=8)))


def make(**options: Any) -> CTRModel:
    torch.manual_seed(0)
    options = {"blocks": [5, 7], "mlp": {"hidden": [8]}} | options
    return create_model("masknet", SCHEMA, embedding_std=0.5, **options).eval()


def block(layer: MaskBlock, e: Tensor, h: Tensor) -> Tensor:
    first, _, second = layer.mask
    mask = (e @ first.weight.T + first.bias).relu() @ second.weight.T + second.bias
    z = (mask * h) @ layer.layer[0].weight.T
    z = (z - z.mean(1, keepdim=True)) / (z.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    return z.relu()


@pytest.mark.parametrize("field_norm", [True, False])
@pytest.mark.parametrize("form", ["parallel", "serial"])
def test_each_form_is_its_equation(form: str, field_norm: bool) -> None:
    model, batch = make(form=form, field_norm=field_norm), example_batch(SCHEMA, rows=6)
    e = model.inputs.embedding(batch).flat
    h = torch.cat([F.layer_norm(part, (4,)) for part in e.split(4, dim=1)], dim=1) if field_norm else e
    if form == "serial":
        for layer in model.blocks:
            h = block(layer, e, h)
    else:
        h = torch.cat([block(layer, e, h) for layer in model.blocks], dim=1)
    torch.testing.assert_close(model(batch), model.head(h).squeeze(1))


def test_a_block_by_hand() -> None:
    layer = MaskBlock(1, 1, 2, ratio=1)
    with torch.no_grad():
        for linear, weight, bias in ((layer.mask[0], 2.0, 1.0), (layer.mask[2], 3.0, -5.0)):
            linear.weight.fill_(weight)
            linear.bias.fill_(bias)
        layer.layer[0].weight.copy_(torch.tensor([[1.0], [-1.0]]))
    # e = 1: mask = 3 relu(2 + 1) - 5 = 4; h = 100: (400, -400), normalised (1, -1), relu (1, 0)
    assert layer(torch.tensor([[1.0]]), torch.tensor([[100.0]])).tolist() == [[1.0, 0.0]]


def test_the_ratio_sets_the_masks_hidden_layer() -> None:
    parallel, serial = make(ratio=3), make(form="serial", ratio=0.5)
    assert [layer.mask[0].out_features for layer in parallel.blocks] == [36, 36]
    assert [layer.mask[0].out_features for layer in serial.blocks] == [6, 2]


def test_each_field_has_its_own_norm() -> None:
    norm, e = FieldNorm(2, 3), torch.randn(4, 6)
    with torch.no_grad():
        norm.weight[1], norm.bias[1] = 2.0, 0.5
    expected = torch.cat([F.layer_norm(e[:, :3], (3,)), 2 * F.layer_norm(e[:, 3:], (3,)) + 0.5], dim=1)
    torch.testing.assert_close(norm(e), expected)


def test_unequal_dimensions_are_refused_where_fields_are_normalised() -> None:
    with pytest.raises(ConfigError, match=r"masknet needs fields of one dimension, found {'a': 4, 'b': 8}"):
        create_model("masknet", UNEVEN)
    assert create_model("masknet", UNEVEN, field_norm=False)(example_batch(UNEVEN, rows=3)).shape == (3,)
