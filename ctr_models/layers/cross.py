"""The gated cross networks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ctr_models.gates.base import Gate, GateShape, GateSpec
from ctr_models.layers.mlp import linear
from ctr_models.shared_rows import Rows, joined


class CrossNetwork(nn.Module):
    """Feature crosses of order up to L + 1: c_{l+1} = c_0 * (W_l c_l + b_l) * gate_l(c_l) + c_l.

    The gate stands in slot ``cross``: it masks W c + b, with c as its context. ``none`` makes this the cross
    network of DCN-V2, ``sigmoid`` that of GDCN. Biases start at zero; the official code draws them from
    U(0, 1), which makes the signal of a deep stack grow by about half with each layer.

    Args:
        width: D.
        layers: L, 1 or more.
        gate: the gate of every layer.

    Example:
        >>> import torch
        >>> CrossNetwork(6, layers=2, gate=GateSpec(name="sigmoid"))(torch.zeros(3, 6)).shape
        torch.Size([3, 6])

    Source: GDCN, arXiv 2311.04635; DCN-V2, arXiv 2008.13535.
    """

    def __init__(self, width: int, *, layers: int, gate: GateSpec) -> None:
        super().__init__()
        self.linears = nn.ModuleList(self.crossing(width) for _ in range(layers))
        self.gates = nn.ModuleList(
            gate.build(GateShape(slot="cross", width=width, context=width, depth=depth)) for depth in range(layers)
        )

    @staticmethod
    def crossing(width: int) -> nn.Module:
        """Return what maps c to W c + b."""
        return linear(width, width)

    def crossed(self, depth: int, c: Tensor) -> Tensor:
        """Return W c + b of one layer, (B, D)."""
        return self.linears[depth](c)

    def layer(self, depth: int, c0: Tensor, c: Tensor) -> Tensor:
        """Return the output of one layer, (B, D)."""
        gate: Gate = self.gates[depth]  # type: ignore[assignment]
        return gate.cross(c0, c, self.linears[depth])  # type: ignore[arg-type]

    def forward(self, c0: Rows) -> Tensor:
        """Map (B, D) to (B, D)."""
        first: Gate = self.gates[0]  # type: ignore[assignment]
        return first.cross_network(joined(c0), self.gates, self.linears)  # type: ignore[arg-type]

    def masks(self, c0: Tensor) -> list[Tensor]:
        """Return the mask of each layer, (B, D). Layer l, from 0, decides over the crosses of order l + 2."""
        masks, c = [], c0
        for depth, gate in enumerate(self.gates):
            masks.append(gate(self.crossed(depth, c), c).expand_as(c))
            c = self.layer(depth, c0, c)
        return masks


class VectorCrossNetwork(CrossNetwork):
    """Crosses with one number a layer: c_{l+1} = c_0 * (w_l . c_l) * gate_l(c_l) + b_l + c_l.

    The cross network of the first DCN, where the gate is ``none``. The bias stands outside the cross.

    Args:
        width: D.
        layers: L.
        gate: the gate of every layer.

    Example:
        >>> import torch
        >>> VectorCrossNetwork(6, layers=2, gate=GateSpec(name="none"))(torch.zeros(3, 6)).shape
        torch.Size([3, 6])

    Source: DCN, arXiv 1708.05123.
    """

    def __init__(self, width: int, *, layers: int, gate: GateSpec) -> None:
        super().__init__(width, layers=layers, gate=gate)
        self.biases = nn.ParameterList(torch.zeros(width) for _ in range(layers))

    @staticmethod
    def crossing(width: int) -> nn.Module:
        """Return what maps c to w . c, (B, 1)."""
        return linear(width, 1, bias=False)

    def crossed(self, depth: int, c: Tensor) -> Tensor:
        """Return w . c of one layer, the same for every coordinate, (B, D)."""
        return super().crossed(depth, c).expand_as(c)

    def layer(self, depth: int, c0: Tensor, c: Tensor) -> Tensor:
        """Return the output of one layer, (B, D)."""
        gate: Gate = self.gates[depth]  # type: ignore[assignment]
        return torch.addcmul(c, c0, gate.gated(self.crossed(depth, c), c)) + self.biases[depth]

    def forward(self, c0: Rows) -> Tensor:
        """Map (B, D) to (B, D)."""
        c = c0 = joined(c0)
        for depth in range(len(self.gates)):
            c = self.layer(depth, c0, c)
        return c
