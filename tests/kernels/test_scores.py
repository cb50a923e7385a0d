from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import shared_linear
from kernels.scores import OPERATOR
from tests.kernels.conformance import conforms, examples

EVERY = pytest.mark.parametrize("one", OPERATOR.implementations, ids=lambda one: one.name)
WIDTHS = {"shared": st.integers(0, 40), "own": st.integers(0, 40), "hidden": st.integers(1, 70)}
FEW = settings(max_examples=6, phases=[Phase.explicit, Phase.generate])


def arguments(
    dtype: torch.dtype, counts: list[int], *, biased: bool = True, **widths: int
) -> tuple[Tensor | None, ...]:
    """Users with so many candidates each."""
    sizes = {"shared": 5, "own": 3, "hidden": 4, **widths}
    users, *_ = examples(OPERATOR, dtype, users=len(counts), each=0, **sizes)
    _, own, _, of_shared, of_own, bias = examples(OPERATOR, dtype, users=1, each=sum(counts), **sizes)
    offsets = torch.tensor([0, *counts]).cumsum(0)
    return users, own, offsets, of_shared, of_own, bias if biased else None


@EVERY
@pytest.mark.parametrize("counts", [[3], [2, 0, 1]])
def test_it_is_the_layer_on_rows_that_hold_both(one, counts: list[int]) -> None:
    users, own, offsets, of_shared, of_own, bias = arguments(torch.float32, counts)
    rows = torch.cat([users.repeat_interleave(torch.tensor(counts), 0), own], dim=1)
    expected = torch.nn.functional.linear(rows, torch.cat([of_shared, of_own], dim=1), bias)
    found, *_ = one.forward(users, own, offsets, of_shared, of_own, bias)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(shared_linear(users, own, offsets, of_shared, of_own, bias, fused=False), expected)


@given(counts=st.lists(st.integers(0, 600), min_size=1, max_size=8), biased=st.booleans(), **WIDTHS)
@example(counts=[0, 1, 2000], biased=True, shared=33, own=17, hidden=65)
@example(counts=[4097], biased=True, shared=33, own=17, hidden=65)
@example(counts=[1] * 300, biased=False, shared=33, own=17, hidden=65)
@FEW
def test_cpu(counts, **sizes) -> None:
    conforms(OPERATOR, OPERATOR.implementations[1], arguments(torch.float32, counts, **sizes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(counts=st.lists(st.integers(0, 70), min_size=1, max_size=3), biased=st.booleans(), **WIDTHS)
@example(counts=[0, 1, 90], biased=True, shared=3, own=17, hidden=65)
@FEW
def test_triton(dtype, counts, **sizes) -> None:
    conforms(OPERATOR, OPERATOR.implementations[0], arguments(dtype, counts, **sizes))


@EVERY
def test_no_user_and_no_candidate(one) -> None:
    conforms(OPERATOR, one, arguments(torch.float32, []))
    conforms(OPERATOR, one, arguments(torch.float32, [0, 0]))


@EVERY
def test_views_of_wider_tensors(one) -> None:
    users, own, offsets, of_shared, of_own, bias = arguments(torch.float32, [2, 3], shared=20, own=20)
    conforms(OPERATOR, one, (users[:, 2:9], own[:, ::2], offsets, of_shared[:, 2:9], of_own[:, ::2], bias))


@pytest.mark.parametrize("counts", [[3], [2, 0, 1]])
def test_gradients(counts: list[int]) -> None:
    values = tuple(v.requires_grad_() if v.is_floating_point() else v for v in arguments(torch.float64, counts))
    assert OPERATOR.chosen(*values) == "cpu"
    assert torch.autograd.gradcheck(shared_linear, values)
