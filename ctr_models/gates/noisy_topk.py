"""The sparse gate that explores: noise of a learned size, and a price on uneven use."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from ctr_models.gates.base import GateShape, register_gate
from ctr_models.gates.topk import TopKConfig, TopKGate, keep_largest
from ctr_models.layers.mlp import linear

SMALLEST_NOISE = 0.01


class NoisyTopKConfig(TopKConfig):
    """Settings of gate ``noisy_topk``."""

    balance: float = Field(0.1, ge=0)
    """Weight of the penalty on uneven importance and load."""


@register_gate("noisy_topk")
class NoisyTopKGate(TopKGate):
    """``topk`` of h + n s(x) in training, n ~ N(0, 1), s(x) = softplus(W_n x) + 0.01; of h alone in evaluation.

    h are the logits of ``topk``. The penalty is balance (CV^2(importance) + CV^2(load)), where CV is standard
    deviation over mean across experts, the importance of an expert is the sum of its weights over the batch, and
    its load is the sum of the probabilities that it would be kept were its own noise drawn anew:
    Phi((h_i - the k-th largest of the others' noisy logits) / s_i). With k = K all are kept and the load is left
    out.

    Args:
        config: see :class:`NoisyTopKConfig`.
        shape: ``choices`` is K.

    Example:
        >>> from ctr_models.gates import GateShape, GateSpec
        >>> gate = GateSpec(name="noisy_topk").build(GateShape(slot="expert", width=3, choices=4))
        >>> x = torch.randn(5, 3)
        >>> bool((gate.eval()(x) == gate(x)).all()), bool((gate.train()(x) == gate(x)).all())
        (True, False)

    Source: arXiv 1701.06538.
    """

    Config = NoisyTopKConfig
    config: NoisyTopKConfig
    source = "arXiv 1701.06538"

    def __init__(self, config: NoisyTopKConfig, shape: GateShape) -> None:
        super().__init__(config, shape)
        self.noise = linear(shape.width, shape.choices, bias=False)
        nn.init.zeros_(self.noise.weight)
        self.unevenness: Tensor | None = None

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return the weights, (B, K), k of them above 0."""
        clean = self.logits(x)
        if not self.training:
            return keep_largest(clean, self.config.k)
        size = F.softplus(self.noise(x)) + SMALLEST_NOISE
        noisy = clean + torch.randn_like(size) * size
        weights = keep_largest(noisy, self.config.k)
        self.unevenness = squared_variation(weights.float().sum(0))
        if self.config.k < self.shape.choices:
            kept = chance_to_be_kept(clean.float(), noisy.float(), size.float(), self.config.k)
            self.unevenness = self.unevenness + squared_variation(kept.sum(0))
        return weights

    def penalty(self) -> Tensor:
        """Return the price of the last training batch's unevenness; 0 if it was asked for already."""
        unevenness, self.unevenness = self.unevenness, None
        return torch.zeros(()) if unevenness is None else self.config.balance * unevenness


def squared_variation(amounts: Tensor) -> Tensor:
    """Return the variance over the squared mean of (K,) amounts.

    Example:
        >>> squared_variation(torch.tensor([1.0, 3.0]))
        tensor(0.2500)
    """
    return amounts.var(correction=0) / amounts.mean().square().clamp_min(1e-10)


def chance_to_be_kept(clean: Tensor, noisy: Tensor, size: Tensor, k: int) -> Tensor:
    """Return the probability, over an expert's own noise, that it is among the k largest of its row.

    Args:
        clean: logits without noise, (B, K).
        noisy: with noise, (B, K).
        size: standard deviation of the noise, (B, K).
        k: kept experts, below K.
    """
    largest = noisy.topk(k + 1, dim=-1).values
    is_kept = noisy > largest[:, k:]
    to_beat = torch.where(is_kept, largest[:, k:], largest[:, k - 1 : k])  # (B, K)
    return torch.special.ndtr((clean - to_beat) / size)
