"""AW-MoE's contrast: a gate should say of a thinned history what it says of the whole one."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ctr_models.layers.target_attention import rows_of


def masked_view(values: Tensor, offsets: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Leave out each behaviour with probability ``share``, but never all of a history.

    Args:
        values: behaviours of all histories, (T, d).
        offsets: where each history begins, and T at the end, (B + 1,).
        share: probability that a behaviour is left out.

    Returns:
        The behaviours that are left, in their order, and their offsets.

    Example:
        >>> values, offsets = masked_view(torch.randn(6, 4), torch.tensor([0, 5, 5, 6]), 0.99)
        >>> bool((offsets.diff() > 0).equal(torch.tensor([True, False, True])))
        True
    """
    rows = rows_of(offsets, values.shape[0]).long()
    draw = torch.rand(values.shape[0], device=values.device)
    count = offsets.shape[0] - 1
    highest = draw.new_zeros(count).scatter_reduce(0, rows, draw, "amax")
    kept = (draw >= share) | (draw == highest[rows])
    lengths = offsets.new_zeros(count).index_add(0, rows, kept.to(offsets.dtype))
    return values[kept], F.pad(lengths.cumsum(0, dtype=offsets.dtype), (1, 0))


def contrastive_loss(one: Tensor, other: Tensor, user: Tensor, *, temperature: float) -> Tensor:
    """Tell a row by one view of it among the other views of its own and of other users' rows.

    The mean over rows i of -log(e_ii / (e_ii + sum over l of e_il)), e_il = exp(cos(one_i, other_l) / temperature),
    where l runs over the rows of other users. Rows of one user are not told apart: their histories are nearly the
    same. User 0 is nobody, and differs from every other row.

    Args:
        one: a gate's output on one view of each row, (B, K).
        other: on another view, (B, K).
        user: (B,) int64.
        temperature: the lower, the harder the nearest other rows are pushed away.

    Returns:
        Scalar, float32; 0 without rows.

    Example:
        >>> views = torch.eye(3)
        >>> round(float(contrastive_loss(views, views, torch.tensor([1, 2, 3]), temperature=1.0)), 4)
        0.5514
        >>> float(contrastive_loss(views, views, torch.tensor([1, 1, 1]), temperature=1.0))
        0.0

    Source: the form is that of arXiv 1807.03748; on gates, AW-MoE, arXiv 2306.05011.
    """
    if not len(one):
        return (one.sum() + other.sum()).float()
    likeness = F.normalize(one.float(), dim=1) @ F.normalize(other.float(), dim=1).T / temperature  # (B, B)
    same = (user.unsqueeze(1) == user) & (user != 0)
    itself = torch.eye(len(one), dtype=torch.bool, device=one.device)
    return (likeness.masked_fill(same & ~itself, -torch.inf).logsumexp(1) - likeness.diagonal()).mean()
