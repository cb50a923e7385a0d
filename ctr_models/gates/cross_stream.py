"""A gate between streams that only adds."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ctr_models.gates.base import Gate, GateConfig, GateShape, register_gate
from ctr_models.layers.mlp import linear


class CrossStreamConfig(GateConfig):
    """Settings of gate ``cross_stream``."""

    start: Literal["paper"] = "paper"
    """The mask is above 1 wherever W y is finite. Moved to begin at 1 it would be gate ``sigmoid``."""


@register_gate("cross_stream")
class CrossStreamGate(Gate):
    """mask = 1 + sigmoid(W y), so that x + x * sigmoid(W y): the other stream y amplifies, and never takes away.

    Without bias; y is ``x`` itself where no context is given.

    Example:
        >>> from ctr_models.gates import GateShape, GateSpec
        >>> gate = GateSpec(name="cross_stream").build(GateShape(slot="fusion", width=2, context=3))
        >>> gate.gated(torch.tensor([[4.0, -2.0]]), torch.zeros(1, 3))
        tensor([[ 6., -3.]], grad_fn=<MulBackward0>)

    Source: PACGNet, arXiv 2512.18291.
    """

    slots = frozenset({"fusion"})
    Config = CrossStreamConfig
    bound, floor = 2.0, 1.0
    source = "arXiv 2512.18291"

    def __init__(self, config: GateConfig, shape: GateShape) -> None:
        super().__init__(config, shape)
        self.linear = linear(shape.context or shape.width, shape.width, bias=False)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return the mask, (B or 1, D1), between 1 and 2."""
        return 1 + torch.sigmoid(self.linear(x if context is None else context))
