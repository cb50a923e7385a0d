"""Multi-head self-attention with a gate."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from ctr_models.errors import ConfigError
from ctr_models.gates.base import GateShape, GateSpec
from ctr_models.layers.mlp import linear


class SelfAttention(nn.Module):
    """Every position looks at all positions: head_h = softmax(Q_h K_h') V_h, heads side by side.

    Q, K and V are linear in the input, without biases. The gate of slot ``attention`` makes the weights of the
    scores, by ``attend``, and masks the heads' outputs, with the layer's input as its context, by ``gated``. A
    gate that leaves ``attend`` alone leaves the softmax.

    Args:
        inputs: C.
        width: of all heads together.
        heads: H, a divisor of ``width``.
        gate: the gate.
        scale: divide the scores by the root of a head's width, as transformers do and AutoInt's paper does not.
        dropout: share of the attention weights that is dropped in training.
        depth: which layer of a stack this is, counted from 0.

    Raises:
        ConfigError: H does not divide the width; the message names the divisors.

    Example:
        >>> import torch
        >>> SelfAttention(4, 6, heads=2, gate=GateSpec(name="none"))(torch.zeros(3, 5, 4)).shape
        torch.Size([3, 5, 6])

    Source: AutoInt, arXiv 1810.11921; scaled, arXiv 1706.03762.
    """

    def __init__(
        self,
        inputs: int,
        width: int,
        *,
        heads: int,
        gate: GateSpec,
        scale: bool = False,
        dropout: float = 0.0,
        depth: int = 0,
    ) -> None:
        super().__init__()
        if width % heads:
            valid = [h for h in range(1, width + 1) if width % h == 0]
            raise ConfigError(
                f"{heads} heads don't divide a width of {width}", where="model.heads", remedy=f"one of {valid}"
            )
        self.heads, self.dropout = heads, dropout
        self.scale = (width // heads) ** -0.5 if scale else 1.0
        self.query, self.key, self.value = (linear(inputs, width, bias=False) for _ in range(3))
        self.gate = gate.build(
            GateShape(slot="attention", width=width // heads, context=inputs, heads=heads, depth=depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, L, C) to (B, L, width)."""
        query, key, value = (self._split(project(x)) for project in (self.query, self.key, self.value))
        scores = (query * self.scale) @ key.transpose(2, 3)  # (B, H, L, L)
        weights = F.dropout(self.gate.attend(scores, x), self.dropout, self.training)
        heads = self.gate.gated(weights @ value, x)  # (B, H, L, width / H)
        return heads.transpose(1, 2).flatten(2)

    def _split(self, projected: Tensor) -> Tensor:
        return projected.unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, H, L, width / H)
