"""A gate on fields that a small mixer network makes of all fields."""

from __future__ import annotations

import math

from pydantic import Field
from torch import Tensor, nn

from ctr_models.gates.base import Gate, GateConfig, GateShape, register_gate
from ctr_models.layers.mlp import linear


class MixerConfig(GateConfig):
    """Settings of gate ``mixer``."""

    hidden_fields: int = Field(0, ge=0)
    """Hidden units of the perceptron across fields; 0 is F."""
    hidden_values: int = Field(0, ge=0)
    """Hidden units of the perceptron across coordinates; 0 is D."""


@register_gate("mixer")
class MixerGate(Gate):
    """mask = W Mix(x) + b, one value a coordinate of each field, unbounded. Mix is one block of MLP-Mixer:

        h = x + MLP_F(LN(x)) across fields, Mix(x) = h + MLP_D(LN(h)) across coordinates.

    b starts at 1, so that fresh embeddings, which are close to 0, are not multiplied by a mask close to 0.
    ``start: identity`` starts W at zero besides. Difference from the official code: the linear map stands on the
    mask, where the code puts it on x and lets Mix(x) be the mask; x then passes as it is, as from any gate.

    Args:
        config: see :class:`MixerConfig`.
        shape: needs ``fields``.

    Example:
        >>> import torch
        >>> from ctr_models.gates import GateShape, GateSpec
        >>> gate = GateSpec(name="mixer").build(GateShape(slot="field", width=4, fields=6))
        >>> gate(torch.ones(3, 6, 4)).shape
        torch.Size([3, 6, 4])

    Source: NiNformer, arXiv 2403.02411; MLP-Mixer, arXiv 2105.01601.
    """

    slots = frozenset({"field"})
    Config = MixerConfig
    config: MixerConfig
    bound, floor = math.inf, -math.inf
    source = "arXiv 2403.02411"

    def __init__(self, config: MixerConfig, shape: GateShape) -> None:
        super().__init__(config, shape)
        fields, width = shape.fields, shape.width
        self.norm_fields, self.norm_values = nn.LayerNorm(width), nn.LayerNorm(width)
        self.across_fields = _perceptron(fields, config.hidden_fields or fields)
        self.across_values = _perceptron(width, config.hidden_values or width)
        self.linear = linear(width, width)
        nn.init.ones_(self.linear.bias)
        if config.start == "identity":
            nn.init.zeros_(self.linear.weight)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return the mask, (B, F, D)."""
        h = x + self.across_fields(self.norm_fields(x).transpose(1, 2)).transpose(1, 2)
        return self.linear(h + self.across_values(self.norm_values(h)))


def _perceptron(width: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(linear(width, hidden), nn.GELU(), linear(hidden, width))
