"""Target attention over jagged histories, from behaviours and candidates to one vector a history."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.activated_linear import Activation, activated_linear
from kernels.jagged import rows_of
from kernels.jagged_pool import jagged_pool
from kernels.moments import moments
from kernels.target_layer import target_layer


class ActivatedLayer(NamedTuple):
    """An activation and the linear layer behind it.

    Args:
        weight: (m, h).
        bias: (m,); None stands for 0.
        activation: ``dice``, ``sigmoid`` or ``relu``.
        alpha: Dice's slope below the mean, (h,).
        mean: Dice's mean, (h,); None takes mean and variance of the behaviours at hand, as in training.
        rate: 1 over Dice's standard deviation, (h,).
    """

    weight: Tensor
    bias: Tensor | None
    activation: Activation
    alpha: Tensor | None = None
    mean: Tensor | None = None
    rate: Tensor | None = None


def target_attention(
    values: Tensor,
    offsets: Tensor,
    query: Tensor,
    first: tuple[Tensor, Tensor],
    layers: Sequence[ActivatedLayer],
    prior: Tensor | None = None,
    *,
    softmax: bool = False,
    eps: float = 1e-8,
    fused: bool = True,
) -> Tensor:
    """Return sum_t a_t k_t over each row's behaviours, with a_t = MLP([q, k_t, q - k_t, q * k_t]) for candidate q.

    Three operators and nothing between them: :func:`~kernels.target_layer.target_layer`,
    :func:`~kernels.activated_linear.activated_linear` for each further layer, and
    :func:`~kernels.jagged_pool.jagged_pool`. What a layer's statistics need, all its inputs, is what is kept.

    Args:
        values: behaviours k of all rows, (T, d).
        offsets: where each row's behaviours begin, and T at the end, (B + 1,).
        query: the candidates q, (B, d).
        first: weight (h, 4 d) and bias (h,) of the first layer.
        layers: the activation of the first layer and the second, and so on; the last has one output.
        prior: what a behaviour's position alone adds to its score, (T,).
        softmax: whether a row's weights add up to 1.
        eps: added to Dice's variance.
        fused: False computes the definitions.

    Returns:
        (B, d), zeros for an empty row.

    Example:
        >>> k, q, offsets = torch.tensor([[3.0], [5.0]]), torch.tensor([[2.0]]), torch.tensor([0, 2])
        >>> first = torch.tensor([[0.0, 0.0, 0.0, 1.0]]), torch.zeros(1)
        >>> target_attention(k, offsets, q, first, [ActivatedLayer(torch.ones(1, 1), None, "relu")])
        tensor([[68.]])

    Source: DIN, arXiv 1706.06978.
    """
    s = target_layer(values, offsets, query, *first, fused=fused)
    for layer in layers:
        mean, rate = layer.mean, layer.rate
        if layer.activation == "dice" and mean is None:
            mean, variance = moments(s)
            rate = (variance + eps).rsqrt()
        s = activated_linear(
            s, layer.weight, layer.bias, activation=layer.activation, alpha=layer.alpha, mean=mean, rate=rate,
            fused=fused,
        )  # fmt: skip
    return jagged_pool(values, s.squeeze(1), offsets, prior, softmax=softmax, fused=fused)


def padded(
    values: Tensor,
    offsets: Tensor,
    query: Tensor,
    first: tuple[Tensor, Tensor],
    layers: Sequence[ActivatedLayer],
    prior: Tensor | None = None,
    *,
    longest: int,
    softmax: bool = False,
    eps: float = 1e-8,
) -> Tensor:
    """Return the same as :func:`target_attention`, by the usual way, which tests and benchmarks compare it with.

    Histories are padded to ``longest``, [q, k, q - k, q * k] is laid out, and what is padding is masked at the end.
    Dice's statistics are those of the behaviours that are there.

    Example:
        >>> k, q, offsets = torch.tensor([[3.0], [5.0]]), torch.tensor([[2.0]]), torch.tensor([0, 2])
        >>> first = torch.tensor([[0.0, 0.0, 0.0, 1.0]]), torch.zeros(1)
        >>> padded(k, offsets, q, first, [ActivatedLayer(torch.ones(1, 1), None, "relu")], longest=9)
        tensor([[68.]])
    """
    rows, lengths = rows_of(offsets, values.shape[0]), offsets.diff()
    place = torch.arange(values.shape[0], device=values.device) - offsets[rows]
    keys = values.new_zeros(query.shape[0], longest, values.shape[1]).index_put((rows, place), values)  # (B, L, d)
    there = torch.arange(longest, device=values.device) < lengths.unsqueeze(1)  # (B, L)
    q = query.unsqueeze(1).expand_as(keys)
    s = F.linear(torch.cat((q, keys, q - keys, q * keys), dim=-1), *first)  # (B, L, h)
    for layer in layers:
        if layer.activation == "dice":
            assert layer.alpha is not None
            mean, rate = layer.mean, layer.rate
            if mean is None or rate is None:
                count = lengths.sum()
                mean = (s * there.unsqueeze(2)).sum((0, 1)) / count
                rate = (((s - mean).square() * there.unsqueeze(2)).sum((0, 1)) / count + eps).rsqrt()
            s = s * torch.addcmul(layer.alpha, 1 - layer.alpha, torch.sigmoid((s - mean) * rate))
        else:
            s = torch.sigmoid(s) if layer.activation == "sigmoid" else torch.relu(s)
        s = F.linear(s, layer.weight, layer.bias)
    scores = s.squeeze(2)  # (B, L)
    if prior is not None:
        scores = scores + prior.new_zeros(scores.shape).index_put((rows, place), prior)
    if softmax:
        scores = scores.masked_fill(~there, -torch.inf).softmax(1)
    weights = torch.where(there, scores, 0)
    return (weights.unsqueeze(1) @ keys).squeeze(1)
