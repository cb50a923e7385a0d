"""A gate between the layers of a tower: is this row worth another layer?"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from ctr_models.gates.base import Gate, GateConfig, GateShape, register_gate
from ctr_models.layers.mlp import linear


class AdaptiveDepthConfig(GateConfig):
    """Settings of gate ``adaptive_depth``. ``start: identity`` sends every row on."""

    confidence: float = Field(0.95, gt=0.5, lt=1)
    """With ``start: identity``, the probability to go on that each row begins with."""
    warm: float = Field(0.3, ge=0, lt=1)
    """Share of training in which the gate says 1/2 to every row, so that each exit has learnt before it is judged:
    gates that choose among exits at random soon send all rows to one."""


@register_gate("adaptive_depth")
class AdaptiveDepthGate(Gate):
    """p(go on) = sigmoid(w . [x, doubt] + b), from a layer's output and the doubt of the exit behind it.

    ``ctr_models.layers.Exits`` trains it jointly with the exits, accuracy weighed against cost. b starts at 0;
    ``start: identity`` starts w at zero and b above 0, so that every row reaches the last layer, as in the
    control.

    Difference from the paper: its gates see the doubt of the exit alone (largest probability, entropy, margin:
    functions of one number, where there are two classes); ours see the layer too.

    Args:
        config: see :class:`AdaptiveDepthConfig`.
        shape: a ``context`` of 1 means that the model gives the exit's doubt.

    Example:
        >>> from ctr_models.gates import GateShape, GateSpec
        >>> gate = GateSpec(name="adaptive_depth").build(GateShape(slot="depth", width=4, context=1))
        >>> gate(torch.ones(3, 4), torch.ones(3, 1)).shape
        torch.Size([3, 1])

    Source: JEI-DNN, arXiv 2310.09163.
    """

    slots = frozenset({"depth"})
    Config = AdaptiveDepthConfig
    config: AdaptiveDepthConfig
    source = "arXiv 2310.09163"
    decides: Tensor

    def __init__(self, config: AdaptiveDepthConfig, shape: GateShape) -> None:
        super().__init__(config, shape)
        self.linear = linear(shape.width + shape.context, 1)
        self.register_buffer("decides", torch.tensor(True))
        if config.start == "identity":
            nn.init.zeros_(self.linear.weight)
            nn.init.constant_(self.linear.bias, torch.logit(torch.tensor(config.confidence)).item())

    def anneal(self, done: float) -> None:
        """Begin to decide after the share ``warm`` of training."""
        self.decides.fill_(done >= self.config.warm)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return the probability to go on, (B, 1)."""
        on = torch.sigmoid(self.linear(x if context is None else torch.cat([x, context], dim=1)))
        return on.where(self.decides, 0.5)
