"""The gated cross network."""

from __future__ import annotations

from torch import Tensor, nn

from ctr_models.gates.base import GateShape, GateSpec
from ctr_models.layers.mlp import linear
from kernels import gated_cross


class CrossNetwork(nn.Module):
    """Feature crosses of order up to L + 1: c_{l+1} = c_0 * (W_l c_l + b_l) * gate_l(c_l) + c_l.

    The gate stands in slot ``cross``: it masks W c + b, with c as its context. ``none`` makes this the cross
    network of DCN-V2, ``sigmoid`` that of GDCN. Biases start at zero; the official code draws them from
    U(0, 1), which makes the signal of a deep stack grow by about half with each layer.

    Args:
        width: D.
        layers: L.
        gate: the gate of every layer.

    Example:
        >>> import torch
        >>> CrossNetwork(6, layers=2, gate=GateSpec(name="sigmoid"))(torch.zeros(3, 6)).shape
        torch.Size([3, 6])

    Source: GDCN, arXiv 2311.04635; DCN-V2, arXiv 2008.13535.
    """

    def __init__(self, width: int, *, layers: int, gate: GateSpec) -> None:
        super().__init__()
        shape = GateShape(slot="cross", width=width, context=width)
        self.linears = nn.ModuleList(linear(width, width) for _ in range(layers))
        self.gates = nn.ModuleList(gate.build(shape) for _ in range(layers))

    def forward(self, c0: Tensor) -> Tensor:
        """Map (B, D) to (B, D)."""
        c = c0
        for crossing, gate in zip(self.linears, self.gates, strict=True):
            c = gated_cross(c0, gate.gated(crossing(c), c), c)
        return c
