"""The gate that draws: choices are sampled in training, ever more decidedly."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from ctr_models.gates.base import Gate, GateConfig, GateShape, register_gate
from ctr_models.layers.mlp import linear


class GumbelConfig(GateConfig):
    """Settings of gate ``gumbel``."""

    temperature: float = Field(1.0, gt=0)
    """At the start of training."""
    final_temperature: float = Field(0.1, gt=0)
    """At its end."""
    hard: bool = False
    """Whether the likeliest choice takes all, its gradient being that of the soft weights."""


@register_gate("gumbel")
class GumbelGate(Gate):
    """weights = softmax((l + g) / temperature) with Gumbel noise g in training, softmax(l / temperature) after.

    Slot ``expert``: l = W x + b. Slot ``interaction``: l = x, the logits of each pair's treatments.
    The temperature falls in a line from ``temperature`` to ``final_temperature`` over the training and is kept
    with the weights, so that evaluation and export see what training reached. ``start: identity`` starts W at
    zero: 1 / K for every expert in evaluation.

    Args:
        config: see :class:`GumbelConfig`.
        shape: ``choices`` is K.

    Example:
        >>> from ctr_models.gates import GateShape, GateSpec
        >>> gate = GateSpec(name="gumbel").build(GateShape(slot="interaction", width=2, choices=2)).eval()
        >>> gate(torch.tensor([[0.0, 1.0]]))
        tensor([[0.2689, 0.7311]])
        >>> gate.anneal(1.0)
        >>> gate(torch.tensor([[0.0, 1.0]]))
        tensor([[4.5398e-05, 9.9995e-01]])

    Source: arXiv 1611.01144; in OptInter, arXiv 2108.01265, and MaskLLM, arXiv 2409.17481.
    """

    slots = frozenset({"expert", "interaction"})
    Config = GumbelConfig
    config: GumbelConfig
    source = "arXiv 1611.01144"
    temperature: Tensor

    def __init__(self, config: GumbelConfig, shape: GateShape) -> None:
        super().__init__(config, shape)
        self.register_buffer("temperature", torch.tensor(float(config.temperature)))
        self.linear = linear(shape.width, shape.choices) if shape.slot == "expert" else nn.Identity()
        if config.start == "identity" and shape.slot == "expert":
            nn.init.zeros_(self.linear.weight)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return the weights, (B, K)."""
        logits = self.linear(x)
        if self.training:
            logits = logits - torch.empty_like(logits).exponential_().log()
        soft = (logits / self.temperature).softmax(-1)
        if not self.config.hard:
            return soft
        taken = torch.zeros_like(soft).scatter(-1, soft.argmax(-1, keepdim=True), 1.0)
        return taken + soft - soft.detach()

    @torch.no_grad()
    def anneal(self, done: float) -> None:
        """Lower the temperature."""
        first, last = self.config.temperature, self.config.final_temperature
        self.temperature.fill_(first + (last - first) * done)
