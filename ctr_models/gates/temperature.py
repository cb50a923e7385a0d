"""Attention whose sharpness each query chooses."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ctr_models.gates.base import GateConfig, GateShape, present_softmax, register_gate
from ctr_models.gates.none import NoGate
from ctr_models.layers.mlp import linear


@register_gate("temperature")
class TemperatureGate(NoGate):
    """weights = softmax(tau scores), tau = tanh(x_l w_h) + 1 + sigmoid(a_h) log(n), a value a head and query.

    x is the layer's input at the query position and n the number of keys that the query has: a query chooses how
    much of the context it wants, and a long history does not dilute attention. tau is the inverse temperature
    and is never below 0. ``start: identity`` starts w at zero and divides by the tau of the start,
    1 + log(n) / 2, so that it is 1.

    Differences from the paper: the query's part is linear, a value a head; values have no temperature.

    Args:
        config: the settings that every gate has.
        shape: needs ``heads`` and ``context``.

    Example:
        >>> from ctr_models.gates import GateShape, GateSpec
        >>> gate = GateSpec(name="temperature").build(GateShape(slot="attention", width=4, context=6, heads=2))
        >>> gate.attend(torch.zeros(3, 2, 5, 5), torch.zeros(3, 5, 6)).shape
        torch.Size([3, 2, 5, 5])

    Source: Selective Attention, arXiv 2411.12892.
    """

    slots = frozenset({"attention"})
    source = "arXiv 2411.12892"

    def __init__(self, config: GateConfig, shape: GateShape) -> None:
        super().__init__(config, shape)
        self.linear = linear(shape.context, shape.heads, bias=False)
        self.length = nn.Parameter(torch.zeros(shape.heads, 1, 1))
        if config.start == "identity":
            nn.init.zeros_(self.linear.weight)

    def inverse(self, query: Tensor, keys: Tensor) -> Tensor:
        """Return tau, (B, H, Q, 1).

        Args:
            query: the layer's input at the query positions, (B, Q, C).
            keys: how many keys each query has, (B, H, Q, 1).
        """
        asked = torch.tanh(self.linear(query)).transpose(1, 2).unsqueeze(3)  # (B, H, Q, 1)
        span = keys.clamp(min=1).to(asked.dtype).log()
        tau = asked + 1 + torch.sigmoid(self.length) * span
        return tau / (1 + span / 2) if self.config.start == "identity" else tau

    def attend(self, scores: Tensor, query: Tensor) -> Tensor:
        """Return the weights, (B, H, Q, L)."""
        absent = scores.isneginf()
        tau = self.inverse(query, absent.logical_not().sum(-1, keepdim=True))
        # -inf times tau would give tau a gradient of 0 * inf.
        return present_softmax((scores.masked_fill(absent, 0) * tau).masked_fill(absent, -torch.inf))
