from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ctr_models.jagged import rows_of
from ctr_models.layers.dice import Dice
from ctr_models.layers.target_attention import ActivatedLinear, TargetAttention, TargetAttentionConfig

LENGTHS = torch.tensor([3, 0, 1, 6, 0, 2])
OFFSETS = F.pad(LENGTHS.cumsum(0), (1, 0))
D = 4


def inputs() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    values = torch.randn(int(LENGTHS.sum()), D, dtype=torch.float64, requires_grad=True)
    return values, torch.randn(len(LENGTHS), D, dtype=torch.float64, requires_grad=True)


def make(**config: Any) -> TargetAttention:
    torch.manual_seed(1)
    attention = TargetAttention(D, TargetAttentionConfig(hidden=(8, 5), **config)).double()
    for name, parameter in attention.named_parameters():
        if "bias" in name or "alpha" in name:
            nn.init.normal_(parameter)
    return attention


def padded_reference(attention: TargetAttention, values: Tensor, query: Tensor) -> Tensor:
    """The paper, laid out: every row padded to the longest, [q, k, q - k, q * k] joined, absent ones masked."""
    longest = int(LENGTHS.max())
    keys = torch.stack([F.pad(k, (0, 0, 0, longest - len(k))) for k in values.split(LENGTHS.tolist())])  # (B, L, d)
    there = torch.arange(longest) < LENGTHS.unsqueeze(1)  # (B, L)
    q = query.unsqueeze(1).expand_as(keys)
    x = attention.first(torch.cat([q, keys, q - keys, q * keys], dim=-1))  # (B, L, h)
    for layer in (part for pair in attention.rest for part in (pair.activation, pair.linear)):
        if isinstance(layer, Dice):  # statistics over what is there
            seen = x[there]
            p = torch.sigmoid((x - seen.mean(0)) / (seen.var(0, correction=0) + layer.eps).sqrt())
            x = p * x + (1 - p) * layer.alpha * x
        else:
            x = layer(x.clone())
    scores = x.squeeze(-1)  # (B, L)
    if attention.softmax:
        scores = scores.masked_fill(~there, -1e9).softmax(-1)
    return scores[there]


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("activation", ["dice", "sigmoid", "relu"])
def test_it_is_the_padded_network_with_the_same_gradients(activation: str, softmax: bool) -> None:
    attention, (values, query) = make(activation=activation, softmax=softmax), inputs()
    wanted = [values, query, *attention.parameters()]
    weight = torch.randn(len(values), dtype=torch.float64)
    expected = padded_reference(attention, values, query)
    expected_grads = torch.autograd.grad((expected * weight).sum(), wanted)
    scores = attention(values, OFFSETS, query)
    torch.testing.assert_close(scores, expected)
    for found, wished in zip(torch.autograd.grad((scores * weight).sum(), wanted), expected_grads, strict=True):
        torch.testing.assert_close(found, wished)


def test_an_unnormalised_score_does_not_depend_on_the_rest_of_the_history() -> None:
    attention, (values, query) = make().eval(), inputs()
    alone = torch.cat(
        [
            attention(values[i : i + 1], torch.tensor([0, 1]), query[r : r + 1])
            for i, r in enumerate(rows_of(OFFSETS, 12))
        ]
    )
    torch.testing.assert_close(attention(values, OFFSETS, query), alone)


def test_no_behaviour_at_all() -> None:
    for softmax in (False, True):
        attention = make(softmax=softmax)
        scores = attention(torch.empty(0, D).double(), torch.zeros(4, dtype=torch.int64), torch.ones(3, D).double())
        assert scores.shape == (0,)
        scores.sum().backward()
        assert all(p.grad is not None and not p.grad.any() for p in attention.parameters())


def test_dropout_and_depth_are_those_of_the_config() -> None:
    attention = TargetAttention(D, TargetAttentionConfig(hidden=(8, 5), dropout=0.5))
    assert [tuple(layer.linear.weight.shape) for layer in attention.rest] == [(5, 8), (1, 5)]
    assert [layer.dropout.p for layer in attention.rest] == [0.5, 0.5]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ["dice", "relu", "sigmoid", "gelu"])
def test_a_fused_layer_is_its_parts(activation, training) -> None:
    layer = ActivatedLinear(6, 3, activation=activation).train(training)
    parts = copy.deepcopy(layer)
    if activation == "dice":
        torch.nn.init.normal_(layer.activation.alpha)
        layer.activation.variance.fill_(2.0)
        parts = copy.deepcopy(layer)
    s = torch.randn(50, 6)
    a, b = s.clone().requires_grad_(), s.clone().requires_grad_()
    left, right = layer(a), parts.linear(parts.activation(b * 1))
    torch.testing.assert_close(left, right)
    left.square().sum().backward()
    right.square().sum().backward()
    torch.testing.assert_close(a.grad, b.grad)
    for (name, one), other in zip(layer.named_parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=name)
    for one, other in zip(layer.buffers(), parts.buffers(), strict=True):
        torch.testing.assert_close(one, other)


def test_a_softmax_has_no_bias_that_it_could_not_see() -> None:
    assert make(softmax=True).rest[-1].linear.bias is None
    assert make().rest[-1].linear.bias is not None
