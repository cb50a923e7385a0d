"""Attention over a history, shared with a prior for what is recent."""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor, nn

from ctr_models.gates.base import GateConfig, GateShape, register_gate
from ctr_models.gates.none import NoGate
from ctr_models.jagged import rows_of


class RecencyConfig(GateConfig):
    """Settings of gate ``recency``."""

    half_life: float = Field(8.0, gt=0)
    """Behaviours after which the prior falls to half, at the start; learned."""


@register_gate("recency")
class RecencyGate(NoGate):
    """pooled = sum_j ((1 - g) score_j + g prior_j) v_j, with g = sigmoid(l) and prior_j ~ exp(-r age_j).

    The scores are the model's own; the prior sums to 1 over a history, and the newest behaviour has age 0. l and
    r > 0 are learned. l starts at 1, as published; ``start: identity`` takes g = tanh(l) and l = 0.

    Differences from the paper: a history has one direction, so that the position prior is a decay in the age and
    not a quadratic in a two-dimensional offset; there is one head.

    Args:
        config: see :class:`RecencyConfig`.
        shape: of slot ``sequence``.

    Example:
        >>> from ctr_models.gates import GateShape, GateSpec
        >>> gate = GateSpec(name="recency").build(GateShape(slot="sequence", width=1))
        >>> offsets = torch.tensor([0, 2, 2])  # a history of two, and none
        >>> gate.pool(torch.ones(2, 1), torch.zeros(2), offsets, torch.zeros(2, 1)).detach()
        tensor([[0.7311],
                [0.0000]])

    Source: ConViT's gated positional self-attention, arXiv 2103.10697.
    """

    slots = frozenset({"sequence"})
    Config = RecencyConfig
    config: RecencyConfig
    source = "arXiv 2103.10697"

    def __init__(self, config: RecencyConfig, shape: GateShape) -> None:
        super().__init__(config, shape)
        self.share_logit = nn.Parameter(torch.tensor(0.0 if config.start == "identity" else 1.0))
        self.log_rate = nn.Parameter(torch.tensor(math.log(math.log(2) / config.half_life)))

    def share(self) -> Tensor:
        """Return g, the share of the prior, a scalar."""
        return torch.tanh(self.share_logit) if self.config.start == "identity" else torch.sigmoid(self.share_logit)

    def prior(self, offsets: Tensor, total: int, dtype: torch.dtype) -> Tensor:
        """Return the prior of each of ``total`` behaviours, (T,); it sums to 1 over each history."""
        rows = rows_of(offsets, total)  # (T,)
        age = offsets[1:][rows] - 1 - torch.arange(total, device=offsets.device)
        decayed = (-self.log_rate.to(dtype).exp() * age).exp()  # 1 for the newest: no sum is below 1
        return decayed / decayed.new_zeros(offsets.numel() - 1).index_add(0, rows, decayed)[rows]

    def pool(self, values: Tensor, scores: Tensor, offsets: Tensor, query: Tensor) -> Tensor:
        """Return one vector a history, (B, D)."""
        share = self.share()
        # Ages don't fit a dtype of eight bits' precision.
        prior = self.prior(offsets, values.shape[0], torch.promote_types(values.dtype, torch.float32))
        weights = (1 - share) * scores + (share * prior).to(scores.dtype)
        return super().pool(values, weights, offsets, query)

    def telemetry(self, mask: Tensor) -> dict[str, float]:
        """Describe g, the share of the prior; there is no mask."""
        return super().telemetry(self.share().reshape(1))
