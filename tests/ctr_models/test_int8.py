"""Int8 products: near the float32 ones, independent of the rows at hand, and gone when the block ends."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ctr_models import Schema, create_model, example_batch, example_rows
from ctr_models.int8 import LEAST, Int8, Observed, definitions, supported
from ctr_models.model import CTRModel

pytestmark = pytest.mark.skipif(not supported(), reason="torch has no int8 products on this machine")
SCHEMA = Schema.of({"user": 30, "item": 40, "hour": 24}, dense=["price"])


def model_of(name: str) -> CTRModel:
    torch.manual_seed(0)
    model = create_model(name, SCHEMA).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("name", ["dnn", "finalmlp", "gdcn", "dcnv2", "autoint", "masknet"])
@torch.no_grad()
def test_scores_are_near_those_of_float32(name: str) -> None:
    model, batch = model_of(name), example_batch(SCHEMA, rows=200)
    with definitions(model):
        with Observed(model) as observed:
            expected = torch.sigmoid(model(batch))
        with Int8(model, observed.ranges):
            found = torch.sigmoid(model(batch))
    apart = (found - expected).abs()
    assert observed.ranges
    assert 0 < apart.max() < 0.1
    assert apart.mean() < 0.01


@torch.no_grad()
def test_a_row_has_one_score_whatever_it_is_scored_with() -> None:
    model, rows = model_of("gdcn"), example_rows(SCHEMA, rows=50)
    batch = rows.batch()
    with definitions(model):
        with Observed(model) as observed:
            model(batch)
        with Int8(model, observed.ranges):
            whole, alone = model(batch), model(rows.batch(slice(0, 1)))
    assert torch.equal(whole[:1], alone)


@torch.no_grad()
def test_a_product_is_that_of_rounded_numbers() -> None:
    layer, x = nn.Linear(3, LEAST), torch.tensor([[0.0, 1.0, 2.55], [0.5, -9.0, 9.0]])
    ranges = {"weight": (0.0, 2.55)}
    scales = layer.weight.abs().amax(dim=1, keepdim=True) / 127
    weight = (layer.weight / scales).round() * scales
    with Int8(layer, ranges):
        found = layer(x)
    rounded = torch.tensor([[0.0, 1.0, 2.55], [0.5, 0.0, 2.55]])  # what lies outside becomes the end of the range
    torch.testing.assert_close(found, rounded @ weight.T + layer.bias, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_only_layers_with_a_range_and_enough_outputs_are_touched() -> None:
    net = nn.Sequential(nn.Linear(8, LEAST), nn.Linear(LEAST, LEAST), nn.Linear(LEAST, LEAST - 1))
    x = torch.randn(5, 8)
    with Observed(net) as observed:
        expected = net(x)
    assert list(observed.ranges) == ["0.weight", "1.weight"]
    assert all(low <= 0 <= high for low, high in observed.ranges.values())
    with Int8(net, {}):
        assert torch.equal(net(x), expected)
    first = net[0](x)
    second = net[1](first)
    with Int8(net, {"1.weight": observed.ranges["1.weight"]}):
        assert torch.equal(net[0](x), first)
        assert not torch.equal(net[1](first), second)
    assert torch.equal(net(x), expected)


@torch.no_grad()
def test_a_constant_input_and_no_rows() -> None:
    layer = nn.Linear(4, LEAST)
    with Observed(layer) as observed:
        layer(torch.zeros(3, 4))
    with Int8(layer, observed.ranges):
        torch.testing.assert_close(layer(torch.zeros(2, 4)), layer.bias.expand(2, -1))
        assert layer(torch.zeros(0, 4)).shape == (0, LEAST)


def test_operators_are_fused_again_after_the_block() -> None:
    model = model_of("gdcn")
    fused = [m.fused for m in model.modules() if hasattr(m, "fused")]
    with pytest.raises(RuntimeError), definitions(model):
        assert not any(m.fused for m in model.modules() if hasattr(m, "fused"))
        raise RuntimeError
    assert [m.fused for m in model.modules() if hasattr(m, "fused")] == fused
    assert any(fused)
