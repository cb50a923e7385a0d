"""Multi-head bilinear fusion of two streams."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def bilinear_fusion(o1: Tensor, o2: Tensor, weight: Tensor, w1: Tensor, w2: Tensor, bias: Tensor) -> Tensor:
    """Return bias + w1 . o1 + w2 . o2 + sum_h o1_h' W_h o2_h, one number a row.

    o1 and o2 are cut into k contiguous heads. The heads are one batched matrix product of (B, d1/k) by
    (d1/k, d2/k), so that nothing of size (B, d1/k, d2/k) ever exists.

    Args:
        o1: first stream, (B, d1).
        o2: second stream, (B, d2).
        weight: one matrix a head, (k, d1/k, d2/k).
        w1: (d1,).
        w2: (d2,).
        bias: scalar, shape ().

    Returns:
        (B,).

    Example:
        >>> o1, o2 = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]])
        >>> zero = torch.zeros(2)
        >>> bilinear_fusion(o1, o2, torch.ones(2, 1, 1), zero, zero, torch.tensor(0.5))  # 1*3 + 2*4 + 0.5
        tensor([11.5000])
        >>> bilinear_fusion(o1, o2, torch.ones(1, 2, 2), zero, zero, torch.tensor(0.5))  # (1+2)*(3+4) + 0.5
        tensor([21.5000])

    Source: FinalMLP, arXiv 2304.00902.
    """
    return reference(o1, o2, weight, w1, w2, bias)


def reference(o1: Tensor, o2: Tensor, weight: Tensor, w1: Tensor, w2: Tensor, bias: Tensor) -> Tensor:
    """The definition, in plain torch."""
    heads, d1, d2 = weight.shape
    left = o1.view(-1, heads, d1).transpose(0, 1)  # (k, B, d1/k), a view
    projected = torch.bmm(left, weight).transpose(0, 1).reshape(-1, heads * d2)  # (B, d2)
    # w1 . o1 is a product of its own (by linear, which autocast knows); w2 joins the reduction over o2, which is
    # needed anyway.
    return F.linear(o1, w1.unsqueeze(0)).squeeze(1) + ((projected + w2) * o2).sum(1) + bias
