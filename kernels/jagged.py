"""Jagged values: rows of different lengths laid end to end, with the offsets at which each row begins."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 163840
"""Numbers that are worked on at a time on CPU, so that what is made of them stays in the core's own cache."""


def rows_of(offsets: Tensor, total: int) -> Tensor:
    """Return the row to which each of ``total`` jagged values belongs.

    Example:
        >>> rows_of(torch.tensor([0, 2, 2, 3]), 3)
        tensor([0, 0, 2])
    """
    return torch.repeat_interleave(offsets.diff(), output_size=total)


def segment_sum(values: Tensor, offsets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the sum of each row's values, in their order, on CPU; no gradient.

    Args:
        values: (T, D).
        offsets: where each row begins, and T at the end, (B + 1,).
        weights: of the values, (T,); None stands for 1.

    Returns:
        (B, D); zeros for an empty row.

    Example:
        >>> segment_sum(torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([0, 2, 2, 3])).T
        tensor([[3., 0., 4.]])
    """
    if not values.numel():
        return values.new_zeros(offsets.numel() - 1, values.shape[1])
    # A bag of consecutive rows: the one vectorised sum over segments that torch has on CPU.
    order = torch.arange(values.shape[0], dtype=offsets.dtype)
    return F.embedding_bag(
        order, values.detach(), offsets, mode="sum", include_last_offset=True, per_sample_weights=weights
    )


def blocks(total: int, width: int) -> Iterator[slice]:
    """Cut ``total`` values of ``width`` numbers each into blocks of :data:`BLOCK` numbers.

    Example:
        >>> list(blocks(3000, 80))
        [slice(0, 2048, None), slice(2048, 3000, None)]
    """
    step = max(1, BLOCK // width)
    for start in range(0, total, step):
        yield slice(start, min(start + step, total))


def row_blocks(offsets: Tensor, width: int) -> Iterator[tuple[slice, slice]]:
    """Cut whole rows into blocks whose values are about :data:`BLOCK` numbers; yield rows and values of each.

    Example:
        >>> list(row_blocks(torch.tensor([0, 2000, 4000, 4000]), 80))
        [(slice(0, 1, None), slice(0, 2000, None)), (slice(1, 3, None), slice(2000, 4000, None))]
    """
    starts, most = offsets.tolist(), BLOCK // width
    first, last = 0, len(starts) - 1
    for row in range(1, last + 1):
        if row == last or starts[row + 1] - starts[first] > most:
            yield slice(first, row), slice(starts[first], starts[row])
            first = row
