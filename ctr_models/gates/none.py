"""The control: a gate that is not there."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor, nn

from ctr_models.gates.base import SLOTS, Gate, register_gate
from kernels import cross_network


@register_gate("none")
class NoGate(Gate):
    """Lets everything pass: the mask is 1.

    In slot ``expert`` all K experts have the weight 1 / K; in slot ``interaction`` the logits decide by
    themselves, weights = softmax(x); in slot ``depth`` every layer is passed.

    Example:
        >>> import torch
        >>> from ctr_models.gates import GateShape, GateSpec
        >>> gate, x = GateSpec(name="none").build(GateShape(slot="feature", width=4)), torch.ones(2, 4)
        >>> gate.gated(x) is x
        True
        >>> GateSpec(name="none").build(GateShape(slot="expert", width=4, choices=2))(x)
        tensor([[0.5000, 0.5000],
                [0.5000, 0.5000]])
    """

    slots = frozenset(SLOTS)
    by_context = True

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return a mask of ones with one element; in slots expert and interaction weights, (B, K)."""
        if self.shape.slot == "expert":
            return x.new_full((x.shape[0], self.shape.choices), 1 / self.shape.choices)
        if self.shape.slot == "interaction":
            return x.softmax(-1)
        return x.new_ones((1,) * x.dim())

    def gated(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return ``x`` itself."""
        return x

    def cross_network(self, c0: Tensor, gates: Collection[Gate], layers: Collection[nn.Linear]) -> Tensor:
        """Return the cross network of DCN-V2."""
        weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
        return cross_network(c0, weights, biases, fused=self.fused)
