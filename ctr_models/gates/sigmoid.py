"""GDCN's information gate."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from ctr_models.gates.base import Gate, GateConfig, GateShape, register_gate
from ctr_models.layers.mlp import linear
from kernels import cross_network, gated_cross


@register_gate("sigmoid")
class SigmoidGate(Gate):
    """mask = sigmoid(W context), one value a coordinate, without bias; the context is ``x`` if none is given.

    In slot ``cross`` it decides which coordinates of each cross reach the next layer. ``start: identity``
    doubles the mask and starts W at zero, 2 sigmoid(0) = 1; its range is then [0, 2].

    Example:
        >>> from ctr_models.gates import GateShape, GateSpec
        >>> gate = GateSpec(name="sigmoid").build(GateShape(slot="cross", width=4, context=4))
        >>> gate(torch.ones(3, 4), torch.zeros(3, 4))[0]
        tensor([0.5000, 0.5000, 0.5000, 0.5000], grad_fn=<SelectBackward0>)

    Source: GDCN, arXiv 2311.04635.
    """

    slots = frozenset({"cross", "attention", "fusion"})
    source = "arXiv 2311.04635"

    def __init__(self, config: GateConfig, shape: GateShape) -> None:
        super().__init__(config, shape)
        self.linear = linear(shape.context or shape.width, shape.width, bias=False)
        if config.start == "identity":
            nn.init.zeros_(self.linear.weight)
            self.bound = 2.0  # type: ignore[misc]

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return the mask: shape of ``x``, or with a context (B, 1, L, D), one for all heads, in slot attention."""
        mask = torch.sigmoid(self.linear(x if context is None else context))
        while mask.dim() < x.dim():
            mask = mask.unsqueeze(1)
        return mask if self.bound == 1.0 else mask * self.bound

    def cross(self, c0: Tensor, c: Tensor, layer: nn.Linear) -> Tensor:
        """Return the cross layer of GDCN."""
        if self.bound != 1.0:
            return super().cross(c0, c, layer)
        return gated_cross(c0, c, layer.weight, layer.bias, self.linear.weight, fused=self.fused)

    def cross_network(self, c0: Tensor, gates: Collection[Gate], layers: Collection[nn.Linear]) -> Tensor:
        """Return the cross network of GDCN."""
        if self.bound != 1.0:
            return super().cross_network(c0, gates, layers)
        weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
        own: list[Tensor] = [gate.linear.weight for gate in gates]  # type: ignore[union-attr, misc]
        return cross_network(c0, weights, biases, own, fused=self.fused)
