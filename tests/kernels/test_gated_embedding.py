from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from kernels.gated_embedding import OPERATOR, gated_embedding
from tests.kernels.conformance import conforms, examples

EVERY = pytest.mark.parametrize("one", OPERATOR.implementations, ids=lambda one: one.name)
SIZES = {"values": st.integers(1, 50), "width": st.integers(1, 70)}
FEW = settings(max_examples=6, phases=[Phase.explicit, Phase.generate])


@pytest.mark.parametrize("fused", [True, False])
def test_it_is_the_row_times_its_gate(fused: bool) -> None:
    table, logits, ids, sharpness, scale = examples(OPERATOR, torch.float64, rows=9, values=4, width=3)
    expected = (table * (scale / (1 + torch.exp(-2 * logits))).unsqueeze(1))[ids]
    torch.testing.assert_close(gated_embedding(table, logits, ids, sharpness, scale, fused=fused), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(rows=st.integers(0, 100), **SIZES)
@FEW
def test_triton(dtype, **sizes) -> None:
    conforms(OPERATOR, OPERATOR.implementations[0], examples(OPERATOR, dtype, **sizes))


@given(rows=st.integers(0, 4097), **SIZES)
@FEW
def test_cpu(**sizes) -> None:
    conforms(OPERATOR, OPERATOR.implementations[1], examples(OPERATOR, torch.float32, **sizes))


@EVERY
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_value_met_by_every_row(one, dtype) -> None:
    table, logits, _, *rest = examples(OPERATOR, torch.float32, rows=1, values=7, width=5)
    conforms(OPERATOR, one, (table, logits, torch.full((70,), 3, dtype=dtype), *rest))


@EVERY
def test_saturated_gates(one) -> None:
    table, logits, ids, _, scale = examples(OPERATOR, torch.float32, rows=40, values=7, width=5)
    conforms(OPERATOR, one, (table, logits, ids, torch.tensor(1e4), scale))


@EVERY
def test_values_that_no_row_has_get_no_gradient(one) -> None:
    table, logits, _, *rest = examples(OPERATOR, torch.float32, rows=1, values=5, width=3)
    arguments = (table, logits, torch.tensor([4, 1, 4]), *rest)
    _, *kept = one.forward(*arguments)
    of_table, of_logits, *none = one.backward(torch.ones(3, 3), *arguments, *kept)
    assert of_table.any(1).tolist() == (of_logits != 0).tolist() == [False, True, False, False, True]
    assert none == [None, None, None]


def test_gradients() -> None:
    table, logits, ids, *rest = examples(OPERATOR, torch.float64, rows=6, values=4, width=2)
    assert OPERATOR.chosen(table, logits, ids, *rest) == "cpu"
    assert torch.autograd.gradcheck(
        lambda table, logits: gated_embedding(table, logits, ids, *rest),
        (table.requires_grad_(), logits.requires_grad_()),
    )


def test_the_sharpness_has_no_gradient_either_way() -> None:
    table, logits, ids, sharpness, scale = examples(OPERATOR, torch.float32, rows=6, values=4, width=2)
    sharpness.requires_grad_()
    for fused in (True, False):
        out = gated_embedding(table.requires_grad_(), logits, ids, sharpness, scale, fused=fused)
        assert torch.autograd.grad(out.sum(), sharpness, allow_unused=True) == (None,)
