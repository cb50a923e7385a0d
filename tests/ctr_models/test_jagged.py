from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from ctr_models.jagged import rows_of, segment_softmax

LENGTHS = torch.tensor([3, 0, 1, 6, 0, 2])
OFFSETS = F.pad(LENGTHS.cumsum(0), (1, 0))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_rows_come_in_the_dtype_of_the_offsets(dtype: torch.dtype) -> None:
    rows = rows_of(OFFSETS.to(dtype), 12)
    assert rows.tolist() == [0, 0, 0, 2, 3, 3, 3, 3, 3, 3, 5, 5]
    assert rows.dtype == dtype
    assert rows_of(torch.zeros(4, dtype=dtype), 0).shape == (0,)


def test_softmax_of_large_scores_is_finite_and_sums_to_one() -> None:
    rows = rows_of(OFFSETS, 12)
    weights = segment_softmax(1000 * torch.arange(12.0), rows, len(LENGTHS))
    sums = torch.zeros(len(LENGTHS)).index_add(0, rows, weights)
    assert torch.equal(sums, (LENGTHS > 0).float())


def test_softmax_and_its_gradient_are_those_of_each_row_alone() -> None:
    scores = torch.randn(12, dtype=torch.float64, requires_grad=True)
    found = segment_softmax(scores, rows_of(OFFSETS, 12), len(LENGTHS))
    expected = torch.cat([part.softmax(0) for part in scores.split(LENGTHS.tolist())])
    torch.testing.assert_close(found, expected)
    weights = torch.randn(12, dtype=torch.float64)
    pair = (torch.autograd.grad((weights * one).sum(), scores)[0] for one in (found, expected))
    torch.testing.assert_close(*pair)
