"""Values of all rows one after the other, and where each row begins: no padding."""

from __future__ import annotations

import torch
from torch import Tensor


def rows_of(offsets: Tensor, total: int) -> Tensor:
    """Return the row to which each of ``total`` jagged values belongs, (total,), of the dtype of the offsets.

    Args:
        offsets: where each row begins, and ``total`` at the end, (B + 1,).
        total: given, so that a device need not be asked for it.

    Example:
        >>> rows_of(torch.tensor([0, 2, 2, 3]), 3)
        tensor([0, 0, 2])
    """
    return torch.repeat_interleave(offsets.diff(), output_size=total)


def segment_softmax(scores: Tensor, rows: Tensor, count: int) -> Tensor:
    """Return the softmax of the scores within each row.

    Args:
        scores: (T,).
        rows: of each score, (T,).
        count: number of rows.

    Example:
        >>> segment_softmax(torch.tensor([0.0, 0.0, 7.0]), torch.tensor([0, 0, 2]), 3)
        tensor([0.5000, 0.5000, 1.0000])
    """
    rows = rows.long()
    highest = scores.detach().new_full((count,), -torch.inf).scatter_reduce(0, rows, scores.detach(), "amax")
    powers = (scores - highest[rows]).exp()
    return powers / powers.new_zeros(count).index_add(0, rows, powers)[rows]
