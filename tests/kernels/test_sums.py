from __future__ import annotations

import pytest
import torch

from kernels.sums import FEW, summed_product


@pytest.mark.parametrize("columns", [1, FEW, FEW + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_it_is_the_product(columns, dtype) -> None:
    a, b = torch.randn(7, columns).to(dtype), torch.randn(7, 1).to(dtype)
    found = summed_product(a, b)
    assert found.dtype == dtype
    torch.testing.assert_close(found, a.T @ b)


def test_what_cancels_is_not_lost() -> None:
    a = torch.randn(4096, 1)
    both = torch.cat((a * 1e6, torch.ones(1, 1), -a * 1e6))
    assert summed_product(both, torch.ones(8193, 1)).item() == 1


def test_without_rows_it_is_zero() -> None:
    assert torch.equal(summed_product(torch.ones(0, 2), torch.ones(0, 3)), torch.zeros(2, 3))
