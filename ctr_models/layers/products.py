"""Inner products of fields."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ctr_models.shared_rows import Rows, summed


def pairwise(x: Rows, dim: int) -> Tensor:
    """Return the sum of <e_i, e_j> over pairs of fields i < j as half of (|sum e|^2 - sum |e|^2).

    Args:
        x: the fields e side by side, (B, F d).
        dim: d.

    Returns:
        (B,).

    Example:
        >>> pairwise(torch.tensor([[1.0, 2.0, 3.0]]), 1)  # 1*2 + 1*3 + 2*3
        tensor([11.])
    """
    total = summed(lambda e: e.view(e.shape[0], e.shape[1] // dim, dim).sum(1), x)  # (B, d)
    return 0.5 * (total.square().sum(1) - summed(lambda e: e.square().sum(1), x))


class InnerProducts(nn.Module):
    """The inner product of every pair of fields i < j, pairs in the order (0, 1), (0, 2), ..., (F - 2, F - 1).

    Args:
        fields: F.

    Example:
        >>> InnerProducts(3)(torch.tensor([[[1.0], [2.0], [3.0]]]))
        tensor([[2., 3., 6.]])
    """

    def __init__(self, fields: int) -> None:
        super().__init__()
        i, j = torch.triu_indices(fields, fields, offset=1)
        self.width = len(i)
        self.register_buffer("_places", i * fields + j, persistent=False)

    def forward(self, e: Tensor) -> Tensor:
        """Map (B, F, d) to (B, F (F - 1) / 2)."""
        return (e @ e.transpose(1, 2)).flatten(1).index_select(1, self._places)  # (B, F * F) to (B, P)
