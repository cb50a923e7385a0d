"""Attention that can be exactly nothing."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from ctr_models.gates.base import GateConfig, GateShape, present_softmax, register_gate
from ctr_models.gates.none import NoGate


class ClippedSoftmaxConfig(GateConfig):
    """Settings of gate ``clipped_softmax``. ``start: identity`` begins with the softmax and stretches it."""

    alpha: float = Field(0.5, ge=0)
    """gamma = -alpha / L. A key gets nothing below alpha / (zeta L + alpha) of the softmax: under 1, attention
    that is spread evenly still passes. The paper takes 2 to 4 on sequences of 128 and more."""
    zeta: float = Field(1.0, ge=1)
    """Above 1, a key can get exactly 1. The paper finds no use in it."""
    grown: float = Field(0.5, gt=0, le=1)
    """With ``start: identity``, the share of training after which the stretch has its full size."""


@register_gate("clipped_softmax")
class ClippedSoftmaxGate(NoGate):
    """weights = clip((zeta - gamma) softmax(scores) + gamma, 0, 1), gamma = -alpha / L.

    With gamma below 0 a weight can be exactly 0, and a head can do nothing without driving its scores to the
    extremes. L counts the keys that a query has, not the length to which a batch is padded, so that a row does
    not depend on its neighbours. A clipped weight passes no gradient: with an ``alpha`` of 1 or more, a head
    whose attention starts even never learns.

    Example:
        >>> from ctr_models.gates import GateShape, GateSpec
        >>> spec = GateSpec.parse({"name": "clipped_softmax", "alpha": 1.0})
        >>> gate = spec.build(GateShape(slot="attention", width=4, context=4, heads=1))
        >>> gate.attend(torch.tensor([0.6, 0.3, 0.1]).log().view(1, 1, 1, 3), torch.zeros(1, 1, 4))
        tensor([[[[0.4667, 0.0667, 0.0000]]]])

    Source: Quantizable Transformers, arXiv 2306.12929.
    """

    slots = frozenset({"attention"})
    Config = ClippedSoftmaxConfig
    config: ClippedSoftmaxConfig
    source = "arXiv 2306.12929"
    stretch: Tensor

    def __init__(self, config: ClippedSoftmaxConfig, shape: GateShape) -> None:
        super().__init__(config, shape)
        self.register_buffer("stretch", torch.tensor(0.0 if config.start == "identity" else 1.0))

    def anneal(self, done: float) -> None:
        """Grow the stretch from 0 to 1, where the gate starts as the identity."""
        if self.config.start == "identity":
            self.stretch.fill_(min(1.0, done / self.config.grown))

    def attend(self, scores: Tensor, query: Tensor) -> Tensor:
        """Return the clipped weights, (B, H, Q, L)."""
        keys = scores.isneginf().logical_not().sum(-1, keepdim=True).clamp(min=1)
        gamma = -self.config.alpha * self.stretch / keys  # (B, H, Q, 1)
        zeta = 1 + (self.config.zeta - 1) * self.stretch
        weights = (zeta - gamma) * present_softmax(scores) + gamma
        return weights.clamp(0, 1).to(scores.dtype)

    def telemetry(self, mask: Tensor) -> dict[str, float]:
        """Describe the weights, and what share of them is exactly 0."""
        return {**super().telemetry(mask), "zeros": float((mask == 0).float().mean())}
