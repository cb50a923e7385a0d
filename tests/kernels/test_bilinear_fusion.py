from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import bilinear_fusion
from kernels.bilinear_fusion import OPERATOR
from tests.kernels.conformance import conforms, examples

HEADS = {"heads": st.integers(1, 4), "head1": st.integers(1, 70), "head2": st.integers(1, 20)}
FEW = settings(max_examples=6, phases=[Phase.explicit, Phase.generate])
FUSED = pytest.mark.parametrize("fused", [True, False])


@FUSED
@pytest.mark.parametrize(("heads", "d1", "d2"), [(1, 4, 6), (2, 4, 6), (4, 4, 4), (5, 10, 5)])
def test_it_is_the_sum_over_heads(heads: int, d1: int, d2: int, fused: bool) -> None:
    o1, o2, weight, w1, w2, bias = examples(OPERATOR, torch.float64, rows=3, heads=heads, d1=d1, d2=d2)
    expected = bias + o1 @ w1 + o2 @ w2
    for left, w, right in zip(o1.chunk(heads, 1), weight, o2.chunk(heads, 1), strict=True):
        expected = expected + torch.einsum("bi,ij,bj->b", left, w, right)
    torch.testing.assert_close(bilinear_fusion(o1, o2, weight, w1, w2, bias, fused=fused), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(rows=st.integers(0, 100), **HEADS)
@FEW
def test_triton(dtype, rows, heads, head1, head2) -> None:
    arguments = examples(OPERATOR, dtype, rows=rows, heads=heads, d1=heads * head1, d2=heads * head2)
    conforms(OPERATOR, OPERATOR.implementations[0], arguments)


@given(rows=st.integers(0, 4097), **HEADS)
@FEW
def test_cpu(rows, heads, head1, head2) -> None:
    arguments = examples(OPERATOR, torch.float32, rows=rows, heads=heads, d1=heads * head1, d2=heads * head2)
    conforms(OPERATOR, OPERATOR.implementations[1], arguments)


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("heads", [1, 2])
def test_heads_so_wide_that_each_has_a_product_of_its_own(heads: int, rows: int) -> None:
    arguments = examples(OPERATOR, torch.float32, rows=rows, heads=heads, d1=heads * 110, d2=heads * 101)
    conforms(OPERATOR, OPERATOR.implementations[1], arguments)


def test_rows_of_several_groups(monkeypatch) -> None:
    """The gradient of W is summed by groups of rows, which are added up."""
    one = OPERATOR.implementations[0]
    monkeypatch.setitem(one.backward.__globals__, "GROUP", 64)
    conforms(OPERATOR, one, examples(OPERATOR, torch.float32, rows=135, heads=1, d1=2, d2=3))


def test_views_of_wider_streams() -> None:
    both = torch.randn(5, 8)
    _, _, *weights = examples(OPERATOR, torch.float32, rows=5, heads=2, d1=4, d2=4)
    arguments = (both[:, :4], both[:, 4:], *weights)
    assert OPERATOR.chosen(*arguments) == "reference"
    expected = bilinear_fusion(both[:, :4].contiguous(), both[:, 4:].contiguous(), *weights)
    torch.testing.assert_close(bilinear_fusion(*arguments), expected)
    conforms(OPERATOR, OPERATOR.implementations[0], arguments)


@FUSED
def test_gradients(fused: bool) -> None:
    values = examples(OPERATOR, torch.float64, rows=3, heads=2, d1=4, d2=6)
    assert OPERATOR.chosen(*values) == "cpu"
    assert torch.autograd.gradcheck(
        lambda *a: bilinear_fusion(*a, fused=fused), tuple(v.requires_grad_() for v in values)
    )


class _Largest(TorchDispatchMode):
    """Notes the largest tensor that any operator returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@FUSED
def test_nothing_larger_than_its_arguments_ever_exists(fused: bool) -> None:
    rows, d = 64, 40
    values = examples(OPERATOR, torch.float32, rows=rows, heads=4, d1=d, d2=d)
    with _Largest() as largest:
        bilinear_fusion(*(v.requires_grad_() for v in values), fused=fused).sum().backward()
    assert largest.numel <= rows * d  # a broadcast over heads would make rows * d * d / heads
