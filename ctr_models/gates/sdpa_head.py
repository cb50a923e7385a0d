"""A gate a head, on what attention brings back."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ctr_models.gates.base import Gate, GateConfig, GateShape, register_gate
from ctr_models.layers.mlp import linear


@register_gate("sdpa_head")
class SDPAHeadGate(Gate):
    """mask_h = sigmoid(x_l w_h), one value a head and query position, after the weighted sum of the values.

    x is the layer's input at the query position, so that a query can do without a head: softmax weights sum to 1
    and can't say so. Without a context the heads' own outputs decide. No bias. ``start: identity`` doubles the
    mask and starts W at zero, 2 sigmoid(0) = 1; its range is then [0, 2].

    Args:
        config: the settings that every gate has.
        shape: needs ``heads``.

    Example:
        >>> from ctr_models.gates import GateShape, GateSpec
        >>> gate = GateSpec(name="sdpa_head").build(GateShape(slot="attention", width=4, context=6, heads=2))
        >>> gate(torch.ones(3, 2, 5, 4), torch.zeros(3, 5, 6)).shape
        torch.Size([3, 2, 5, 1])

    Source: Gated Attention for Large Language Models, arXiv 2505.06708 (head-specific, after the sum).
    """

    slots = frozenset({"attention"})
    source = "arXiv 2505.06708"

    def __init__(self, config: GateConfig, shape: GateShape) -> None:
        super().__init__(config, shape)
        self.linear = linear(shape.context or shape.heads * shape.width, shape.heads, bias=False)
        if config.start == "identity":
            nn.init.zeros_(self.linear.weight)
            self.bound = 2.0  # type: ignore[misc]

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return the mask of the heads' outputs (B, H, L, D), (B or 1, H, L, 1)."""
        look = x.transpose(1, 2).flatten(2) if context is None else context  # (B, L, C)
        mask = torch.sigmoid(self.linear(look)).transpose(1, 2).unsqueeze(3)  # (B, H, L, 1)
        return mask if self.bound == 1.0 else mask * self.bound
