"""TED: which item follows which in the training sequences, distilled into the items' vectors."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F


class TransitionDistillation(nn.Module):
    """Mean cross-entropy between a teacher that has counted transitions and a student of item vectors alone.

        teacher_ij = softmax_j((C_ij / max_j C_ij) / t),   student_ij = softmax_j(sqrt(d) <dropout(e_i), e_j> / t)

    C_ij counts how often j came after i. Most counts are 0, and all those have one probability, p_i0. So

        loss_i = log sum_j exp(s_ij) - <g_i, p_i0 sum_j e_j + sum over successors j (p_ij - p_i0) e_j>,

    with s_ij = <g_i, e_j> the student's logits: the teacher is never laid out, only its successors are kept.
    An item that nothing has followed teaches nothing and is left out.

    Args:
        starts: where the successors of each item begin, and their number at the end, (N + 1,) integers.
        successors: numbers of items, (S,) integers.
        counts: how often each came, (S,), positive.
        temperature: t. A successor's weight in the softmax is exp(share / t) against 1 of each other item, so t
            must fall as the catalogue grows.
        dropout: of the student's e_i.

    Example:
        >>> teacher = TransitionDistillation([0, 2, 2, 3], [1, 2, 0], [3.0, 1.0, 2.0], temperature=0.5)
        >>> teacher(torch.randn(3, 4), torch.tensor([0, 1, 2])).shape
        torch.Size([])

    Source: arXiv 2311.01056.
    """

    def __init__(
        self,
        starts: npt.ArrayLike,
        successors: npt.ArrayLike,
        counts: npt.ArrayLike,
        *,
        temperature: float,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        begins, often = np.asarray(starts, dtype=np.int64), np.asarray(counts, dtype=np.float64)
        lengths = np.diff(begins)
        size, some = len(lengths), lengths > 0
        rows = np.repeat(np.arange(size), lengths)
        most = np.ones(size)
        if some.any():
            most[some] = np.maximum.reduceat(often, begins[:-1][some])
        # All divided by exp(1 / t), the largest there is: nothing overflows.
        weight = np.exp((often / most[rows] - 1) / temperature)
        zero = np.exp(-1 / temperature)
        total = np.where(some, np.bincount(rows, weights=weight, minlength=size) + zero * (size - lengths), 1.0)
        self.temperature, self.dropout = temperature, dropout
        self.starts: Tensor
        self.successors: Tensor
        self.excess: Tensor
        self.floor: Tensor
        self.register_buffer("starts", torch.from_numpy(begins), persistent=False)
        self.register_buffer(
            "successors", torch.from_numpy(np.asarray(successors, dtype=np.int64)), persistent=False
        )
        self.register_buffer("excess", torch.from_numpy((weight - zero) / total[rows]).float(), persistent=False)
        self.register_buffer("floor", torch.from_numpy(zero / total).float(), persistent=False)

    def forward(self, items: Tensor, given: Tensor) -> Tensor:
        """Return the mean loss of the given items, a scalar; 0 if none has a successor.

        Args:
            items: vectors of all N items, (N, d).
            given: different items, (M,).
        """
        lengths = self.starts.diff()[given]
        given, lengths = given[lengths > 0], lengths[lengths > 0]
        if not len(given):
            return items.sum() * 0
        begins = lengths.cumsum(0) - lengths
        inside = torch.arange(int(lengths.sum()), device=given.device) - begins.repeat_interleave(lengths)
        at = self.starts[given].repeat_interleave(lengths) + inside  # (S',) their successors' places
        followed = F.embedding_bag(
            self.successors[at], items, begins, mode="sum", per_sample_weights=self.excess[at].to(items.dtype)
        )  # (M, d)
        taught = self.floor[given].unsqueeze(1) * items.sum(0) + followed  # (M, d) the teacher's mean vector
        asked = F.dropout(items[given], self.dropout, self.training) * (items.shape[1] ** 0.5 / self.temperature)
        return ((asked @ items.T).logsumexp(1) - (asked * taught).sum(1)).mean()
