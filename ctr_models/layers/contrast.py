"""AW-MoE's contrast: a gate should say of a thinned history what it says of the whole one."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ctr_models.jagged import rows_of


def masked_view(
    values: Tensor, offsets: Tensor, share: float | Tensor, *, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Leave out each behaviour with probability ``share``, but never all of a history.

    Args:
        values: behaviours of all histories, (T, d).
        offsets: where each history begins, and T at the end, (B + 1,).
        share: probability that a behaviour is left out; one for all, or (T,), as of :func:`hard_shares`.
        generator: of the random numbers; torch's own by default.

    Returns:
        The behaviours that are left, in their order, and their offsets.

    Example:
        >>> values, offsets = masked_view(torch.randn(6, 4), torch.tensor([0, 5, 5, 6]), 0.99)
        >>> bool((offsets.diff() > 0).equal(torch.tensor([True, False, True])))
        True
    """
    rows = rows_of(offsets, values.shape[0]).long()
    draw = torch.rand(values.shape[0], device=values.device, generator=generator)
    count = offsets.shape[0] - 1
    highest = draw.new_zeros(count).scatter_reduce(0, rows, draw, "amax")
    kept = (draw >= share) | (draw == highest[rows])
    lengths = offsets.new_zeros(count).index_add(0, rows, kept.to(offsets.dtype))
    return values[kept], F.pad(lengths.cumsum(0, dtype=offsets.dtype), (1, 0))


def hard_shares(attention: Tensor, offsets: Tensor, share: float) -> Tensor:
    """Return how probably each behaviour is left out if those that count most shall go, (T,).

    Of a history's n behaviours the ceil(c n) of the highest attention, c = min(1, 2 share), are left out with
    probability share / c, which is a half unless share is more; the others stay. So about as many go as when each
    goes with probability ``share``, and two views differ.

    Args:
        attention: how much each behaviour counts, (T,).
        offsets: where each history begins, and T at the end, (B + 1,).
        share: of the behaviours that is left out.

    Example:
        >>> hard_shares(torch.tensor([0.1, 0.9, 0.5, 0.2, 3.0]), torch.tensor([0, 4, 5]), 0.25)
        tensor([0.0000, 0.5000, 0.5000, 0.0000, 0.5000])

    Source: randomly high attention masking of MHIM-MIL, arXiv 2307.15254.
    """
    rows = rows_of(offsets, attention.shape[0]).long()
    order = attention.argsort(descending=True, stable=True)
    order = order[rows[order].argsort(stable=True)]  # by history, then by falling attention
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device) - offsets[rows].long()
    among = min(1.0, 2 * share)
    length = offsets.diff()[rows].to(torch.float64)
    return torch.where(rank < among * length - 1e-9, share / among if share else 0.0, 0.0)


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


def spread(weights: Tensor, one: Tensor, other: Tensor, user: Tensor) -> dict[str, float]:
    """Describe how a gate's outputs lie on the sphere; all are made as long as 1 before.

    ``uniformity``: -log of the mean of exp(-2 |g_i - g_l|^2) over rows i, l of different users; 0 if all are alike,
    the larger, the further apart. ``tolerance``: the mean of cos(g_i, g_l) over different rows of one user, which
    are alike in what they mean. ``alignment``: the mean of cos between a row's two views. A contrast at a low
    temperature buys uniformity with tolerance. Figures without a pair to go by are left out.

    Args:
        weights: the gate's outputs, (B, K).
        one: those on one view of each row, (B, K).
        other: on another view, (B, K).
        user: (B,) int64; 0 is nobody, and differs from every other row.

    Example:
        >>> g = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
        >>> {name: round(value, 3) for name, value in spread(g, g, g, torch.tensor([7, 7, 8])).items()}
        {'uniformity': 4.0, 'tolerance': 1.0, 'alignment': 1.0}

    Source: arXiv 2012.09740; uniformity is that of arXiv 2005.10242.
    """
    if not len(weights):
        return {}
    g = F.normalize(weights.float(), dim=1)
    likeness = g @ g.T  # (B, B); |g_i - g_l|^2 = 2 - 2 of it
    itself = torch.eye(len(g), dtype=torch.bool, device=g.device)
    same = (user.unsqueeze(1) == user) & (user != 0) & ~itself
    others = likeness[~same & ~itself]
    found = {}
    if len(others):
        found["uniformity"] = float(math.log(len(others)) - (4 * others - 4).logsumexp(0))
    if same.any():
        found["tolerance"] = float(likeness[same].mean())
    return {**found, "alignment": float(F.cosine_similarity(one.float(), other.float()).mean())}
