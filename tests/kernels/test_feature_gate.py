from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from kernels import feature_gate
from kernels.feature_gate import OPERATOR
from tests.kernels.conformance import conforms, examples

EVERY = pytest.mark.parametrize("one", OPERATOR.implementations, ids=lambda one: one.name)
SHARED = pytest.mark.parametrize("shared", [0, 1])
EACH = pytest.mark.parametrize("each", [1, 4])
SHAPES = {
    "units": st.integers(1, 70),
    "each": st.sampled_from([1, 1, 2, 5, 33]),
    "hidden": st.integers(1, 70),
    "shared": st.integers(0, 1),
    "biased": st.booleans(),
}
FEW = settings(max_examples=6, phases=[Phase.explicit, Phase.generate])


@SHARED
@EACH
def test_it_is_the_equation(shared: int, each: int) -> None:
    x, hidden, weight, bias = examples(OPERATOR, torch.float64, rows=4, units=6, each=each, shared=shared)
    mask = 2 / (1 + torch.exp(-hidden @ weight.T - bias))
    expected = x * mask if each == 1 else torch.einsum("bfd,bf->bfd", x, mask.expand(4, 6))
    torch.testing.assert_close(feature_gate(x, hidden, weight, bias), expected)


def test_zero_logits_change_nothing() -> None:
    x = torch.randn(4, 6)
    assert torch.equal(feature_gate(x, torch.randn(1, 3), torch.zeros(6, 3)), x)


def test_one_value_a_field() -> None:
    x, bias = torch.ones(2, 3, 4), torch.tensor([-100.0, 0.0, 100.0])
    assert feature_gate(x, torch.zeros(1, 2), torch.zeros(3, 2), bias).sum(2).tolist() == [[0, 4, 8], [0, 4, 8]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(rows=st.integers(0, 150), **SHAPES)
@FEW
def test_triton(dtype, rows, biased, **sizes) -> None:
    x, hidden, weight, bias = examples(OPERATOR, dtype, rows=rows, **sizes)
    conforms(OPERATOR, OPERATOR.implementations[0], (x, hidden, weight, bias if biased else None))


@given(rows=st.integers(0, 4097), **SHAPES)
@FEW
def test_cpu(rows, biased, **sizes) -> None:
    x, hidden, weight, bias = examples(OPERATOR, torch.float32, rows=rows, **sizes)
    conforms(OPERATOR, OPERATOR.implementations[1], (x, hidden, weight, bias if biased else None))


def test_a_shared_context_over_many_programs() -> None:
    """Their sums are added up: 1,100 rows are three programs."""
    arguments = examples(OPERATOR, torch.float32, rows=1100, units=2, hidden=3, shared=1)
    conforms(OPERATOR, OPERATOR.implementations[0], arguments)


@EVERY
@SHARED
def test_saturated_gates(one, shared: int) -> None:
    x, hidden, weight, bias = examples(OPERATOR, torch.float32, rows=9, units=5, shared=shared)
    conforms(OPERATOR, one, (x, hidden, weight * 1e4, bias))


def test_views_of_wider_tensors() -> None:
    x, hidden, weight, bias = examples(OPERATOR, torch.float32, rows=9, units=10, hidden=6)
    for one in OPERATOR.implementations:
        conforms(OPERATOR, one, (x[:, 2:7], hidden[:, ::2], weight[:5, ::2], bias[:5]))


@SHARED
@EACH
def test_gradients(shared: int, each: int) -> None:
    sizes = {"rows": 3, "units": 2, "each": each, "hidden": 2, "shared": shared}
    values = tuple(v.requires_grad_() for v in examples(OPERATOR, torch.float64, **sizes))
    assert OPERATOR.chosen(*values) == "cpu"
    assert torch.autograd.gradcheck(feature_gate, values)
