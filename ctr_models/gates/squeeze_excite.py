"""Squeeze and excite: one value a field, from a look at all fields."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from ctr_models.gates.base import Gate, GateShape, register_gate
from ctr_models.gates.context import ContextConfig, require_context
from ctr_models.layers.mlp import linear


class SqueezeExciteConfig(ContextConfig):
    """Settings of gate ``squeeze_excite``. ``context: self`` looks at the fields alone."""

    reduction: int = Field(3, ge=1)
    """The hidden layer has F / reduction units, at least 2."""


@register_gate("squeeze_excite")
class SqueezeExciteGate(Gate):
    """mask_f = sigmoid(W2 relu(W1 z))_f, where z_f is the mean of field f's vector; a context joins z.

    Without biases. ``start: identity`` doubles the mask and starts W2 at zero; its range is then [0, 2].

    Example:
        >>> from ctr_models.gates import GateShape, GateSpec
        >>> gate = GateSpec(name="squeeze_excite").build(GateShape(slot="field", width=4, fields=6))
        >>> gate(torch.ones(3, 6, 4)).shape
        torch.Size([3, 6, 1])

    Source: Squeeze-and-Excitation, arXiv 1709.01507; over feature fields in FiBiNET, arXiv 1905.09433.
    """

    slots = frozenset({"field"})
    Config = SqueezeExciteConfig
    config: SqueezeExciteConfig
    source = "arXiv 1709.01507"

    def __init__(self, config: SqueezeExciteConfig, shape: GateShape) -> None:
        super().__init__(config, shape)
        require_context(config, shape)
        hidden = max(2, shape.fields // config.reduction)
        self.squeeze = linear(shape.fields + shape.context, hidden, bias=False)
        self.excite = linear(hidden, shape.fields, bias=False)
        if config.start == "identity":
            nn.init.zeros_(self.excite.weight)
            self.bound = 2.0  # type: ignore[misc]

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return the mask, (B, F, 1)."""
        z = x.mean(2)  # (B, F)
        if context is not None:
            z = torch.cat([z, context.expand(z.shape[0], -1)], dim=1)
        mask = torch.sigmoid(self.excite(torch.relu(self.squeeze(z))))
        return (mask if self.bound == 1.0 else mask * self.bound).unsqueeze(2)
