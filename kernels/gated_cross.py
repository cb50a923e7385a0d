"""The gated cross layer's elementwise part."""

from __future__ import annotations

import torch
from torch import Tensor


def gated_cross(c0: Tensor, crossed: Tensor, c: Tensor, gate: Tensor | None = None) -> Tensor:
    """Return c0 * crossed * gate + c, where crossed = W c + b.

    Without a gate this is the cross layer of DCN-V2.

    Args:
        c0: input of the whole cross network, (B, D).
        crossed: W c + b, (B, D).
        c: input of this layer, (B, D).
        gate: mask, broadcastable to (B, D); None stands for 1 and costs nothing.

    Returns:
        (B, D).

    Example:
        >>> c0, crossed, c = torch.tensor([[2.0]]), torch.tensor([[3.0]]), torch.tensor([[1.0]])
        >>> gated_cross(c0, crossed, c), gated_cross(c0, crossed, c, torch.tensor([[0.5]]))
        (tensor([[7.]]), tensor([[4.]]))

    Source: GDCN, arXiv 2311.04635; DCN-V2, arXiv 2008.13535.
    """
    return reference(c0, crossed, c, gate)


def reference(c0: Tensor, crossed: Tensor, c: Tensor, gate: Tensor | None = None) -> Tensor:
    """The definition, in plain torch."""
    return torch.addcmul(c, c0, crossed if gate is None else crossed * gate)
