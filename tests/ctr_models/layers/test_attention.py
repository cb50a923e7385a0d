from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ctr_models.errors import ConfigError
from ctr_models.gates import Gate, GateConfig, GateShape, GateSpec
from ctr_models.layers import SelfAttention

NONE = GateSpec(name="none")


class Uniform(Gate):
    """Looks at all keys alike, and closes the second head."""

    slots = frozenset({"attention"})

    def __init__(self, config: GateConfig, shape: GateShape) -> None:
        super().__init__(config, shape)
        self.seen: tuple[Tensor, Tensor] | None = None

    def attend(self, scores: Tensor, query: Tensor) -> Tensor:
        self.seen = (scores, query)
        return torch.full_like(scores, 1 / scores.shape[-1])

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return x.new_tensor([1.0, 0.0]).view(1, 2, 1, 1)


UNIFORM = GateSpec(name=f"{__name__}.Uniform")


def make(
    inputs: int = 5, width: int = 6, *, heads: int = 2, gate: GateSpec = NONE, **options: float
) -> SelfAttention:
    torch.manual_seed(0)
    return SelfAttention(inputs, width, heads=heads, gate=gate, **options).double().eval()  # type: ignore[arg-type]


@torch.no_grad()
def naive(layer: SelfAttention, x: Tensor, scale: float) -> Tensor:
    """One row, one head, one position, one key after the other."""
    rows, length, _ = x.shape
    size = layer.value.out_features // layer.heads
    out = x.new_zeros(rows, length, layer.heads * size)
    for row in range(rows):
        for head in range(layer.heads):
            part = slice(head * size, (head + 1) * size)
            wq, wk, wv = (p.weight[part] for p in (layer.query, layer.key, layer.value))
            for m in range(length):
                scores = [scale * torch.dot(wq @ x[row, m], wk @ x[row, k]) for k in range(length)]
                total = sum(s.exp() for s in scores)
                for k in range(length):
                    out[row, m, part] += scores[k].exp() / total * (wv @ x[row, k])
    return out


@pytest.mark.parametrize(("scale", "factor"), [(False, 1.0), (True, 3**-0.5)])
def test_it_is_the_equation(scale: bool, factor: float) -> None:
    layer, x = make(scale=scale), torch.randn(3, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(layer(x), naive(layer, x, factor))


def test_one_head_by_hand() -> None:
    layer = make(1, 1, heads=1)
    with torch.no_grad():
        for projection, value in ((layer.query, 1.0), (layer.key, 2.0), (layer.value, 3.0)):
            projection.weight.fill_(value)
    x = torch.tensor([[[0.0], [math.log(3) / 2]]], dtype=torch.float64)  # scores of position 1: 0 and (log 3)^2 / 2
    weight = 1 / (1 + math.exp(-(math.log(3) ** 2) / 2))
    value = 3 * math.log(3) / 2
    torch.testing.assert_close(layer(x)[0, :, 0], torch.tensor([value / 2, weight * value], dtype=torch.float64))


def test_the_order_of_positions_does_not_matter() -> None:
    layer, x = make(), torch.randn(2, 4, 5, dtype=torch.float64)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(layer(x[:, order]), layer(x)[:, order])


def test_the_gate_makes_the_weights_and_masks_the_heads() -> None:
    layer, x = make(gate=UNIFORM), torch.randn(3, 4, 5, dtype=torch.float64)
    out = layer(x)
    first = layer.value(x)[..., :3].mean(1, keepdim=True).expand(3, 4, 3)
    torch.testing.assert_close(out, torch.cat([first, torch.zeros_like(first)], dim=2))
    scores, query = layer.gate.seen  # type: ignore[misc]
    assert scores.shape == (3, 2, 4, 4)
    assert query is x


def test_the_gate_learns_the_sizes() -> None:
    shape = make(gate=UNIFORM, depth=2).gate.shape
    assert shape == GateShape(slot="attention", width=3, context=5, heads=2, depth=2)


def test_a_closed_gate_shuts_the_heads() -> None:
    layer, x = make(gate=GateSpec(name="sigmoid")), torch.randn(3, 4, 5, dtype=torch.float64)
    expected = naive(layer, x, 1.0)
    mask = torch.sigmoid(x @ layer.gate.linear.weight.T)  # (B, L, D), the same for both heads
    torch.testing.assert_close(layer(x), expected * mask.repeat(1, 1, 2))


def test_weights_are_dropped_in_training_only() -> None:
    layer, x = make(dropout=0.5), torch.randn(3, 4, 5, dtype=torch.float64)
    assert torch.equal(layer(x), layer(x))
    layer.train()
    assert not torch.equal(layer(x), layer(x))


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"model.heads: 4 heads don't divide a width of 6. one of \[1, 2, 3, 6\]"):
        make(heads=4)
