"""The control: a gate that is not there."""

from __future__ import annotations

from torch import Tensor

from ctr_models.gates.base import Gate, register_gate


@register_gate("none")
class NoGate(Gate):
    """Lets everything pass: the mask is 1.

    Fits every slot whose gate is a mask. (Mixture weights of experts and exit gates have no neutral "1".)

    Example:
        >>> import torch
        >>> from ctr_models.gates import GateShape, GateSpec
        >>> gate, x = GateSpec(name="none").build(GateShape(slot="feature", width=4)), torch.ones(2, 4)
        >>> gate.gated(x) is x
        True
    """

    slots = frozenset({"feature", "field", "selection", "cross", "attention", "sequence", "fusion"})

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return a mask of ones with one element."""
        return x.new_ones((1,) * x.dim())

    def gated(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return ``x`` itself."""
        return x
