from __future__ import annotations

import pytest
import torch

from kernels.moments import moments


@pytest.mark.parametrize("rows", [1, 7, 4097])
def test_they_are_mean_and_variance(rows) -> None:
    s = torch.randn(rows, 5, generator=torch.Generator().manual_seed(0)) + 100
    mean, variance = moments(s)
    torch.testing.assert_close(mean, s.double().mean(0).float())
    torch.testing.assert_close(variance, s.double().var(0, correction=0).float(), rtol=1e-5, atol=1e-6)


def test_gradients() -> None:
    s = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(moments, (s,))


def test_compiled_they_are_the_same() -> None:
    s = torch.randn(9, 3, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(moments, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(s), moments(s))


def test_many_blocks_of_half_precision_do_not_lose_the_sum() -> None:
    s = torch.randn(300_000, 80, generator=torch.Generator().manual_seed(0)).bfloat16()
    _, variance = moments(s)
    assert abs(variance.double().mean().item() - 1) < 2e-3
