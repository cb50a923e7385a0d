from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import bilinear_fusion


@pytest.mark.parametrize(("heads", "d1", "d2"), [(1, 4, 6), (2, 4, 6), (4, 4, 4), (5, 10, 5)])
def test_it_is_the_sum_over_heads(heads: int, d1: int, d2: int) -> None:
    torch.manual_seed(0)
    o1, o2, w1, w2 = (torch.randn(s, dtype=torch.float64) for s in [(3, d1), (3, d2), (d1,), (d2,)])
    weight, bias = torch.randn(heads, d1 // heads, d2 // heads, dtype=torch.float64), torch.tensor(0.3).double()
    expected = bias + o1 @ w1 + o2 @ w2
    for left, w, right in zip(o1.chunk(heads, 1), weight, o2.chunk(heads, 1), strict=True):
        expected = expected + torch.einsum("bi,ij,bj->b", left, w, right)
    torch.testing.assert_close(bilinear_fusion(o1, o2, weight, w1, w2, bias), expected)


def test_gradients() -> None:
    shapes = [(3, 4), (3, 6), (2, 2, 3), (4,), (6,), ()]
    values = tuple(torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes)
    assert torch.autograd.gradcheck(bilinear_fusion, values)


class _Largest(TorchDispatchMode):
    """Notes the largest tensor that any operator returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_nothing_larger_than_its_arguments_ever_exists() -> None:
    rows, heads, d = 64, 4, 40
    o1, o2 = torch.randn(rows, d, requires_grad=True), torch.randn(rows, d, requires_grad=True)
    weight = torch.randn(heads, d // heads, d // heads, requires_grad=True)
    w1, w2 = torch.randn(d, requires_grad=True), torch.randn(d, requires_grad=True)
    with _Largest() as largest:
        bilinear_fusion(o1, o2, weight, w1, w2, torch.zeros(())).sum().backward()
    assert largest.numel <= rows * d  # a broadcast over heads would make rows * d * d / heads
