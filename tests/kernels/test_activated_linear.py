from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from kernels import activated_linear
from kernels.activated_linear import KINDS, OPERATOR
from tests.kernels.conformance import conforms, examples

SHAPES = {
    "rows": st.integers(0, 130),
    "size": st.integers(1, 90),
    "outputs": st.integers(1, 45),
    "activation": st.sampled_from(KINDS),
    "biased": st.booleans(),
}


def arguments(dtype: torch.dtype, activation: str = "dice", *, biased: bool = True, **sizes: int):
    s, weight, bias, *units, _ = examples(OPERATOR, dtype, **sizes)
    units = units if activation == "dice" else [None] * 3
    return s, weight, bias if biased else None, *units, activation


def test_it_is_the_equation() -> None:
    s, weight, bias, alpha, mean, rate, _ = arguments(torch.float64, rows=5, size=3, outputs=2)
    p = torch.sigmoid((s - mean) * rate)
    found = activated_linear(s, weight, bias, activation="dice", alpha=alpha, mean=mean, rate=rate)
    torch.testing.assert_close(found, F.linear(p * s + (1 - p) * alpha * s, weight, bias))
    torch.testing.assert_close(activated_linear(s, weight, activation="relu"), s.relu() @ weight.T)
    torch.testing.assert_close(activated_linear(s, weight, activation="sigmoid"), s.sigmoid() @ weight.T)


@pytest.mark.parametrize(
    ("name", "dtype"), [("triton", torch.float32), ("triton", torch.bfloat16), ("cpu", torch.float32)]
)
@given(**SHAPES)
@example(rows=4097, size=3, outputs=1, activation="dice", biased=True)
@example(rows=33, size=5, outputs=2, activation="sigmoid", biased=False)
@example(rows=33, size=5, outputs=2, activation="relu", biased=True)
@settings(max_examples=6, phases=[Phase.explicit, Phase.generate])
def test_every_implementation(name, dtype, rows, size, outputs, activation, biased) -> None:
    one = next(one for one in OPERATOR.implementations if one.name == name)
    rows = rows if name == "cpu" else min(rows, 150)  # the interpreter is slow
    conforms(OPERATOR, one, arguments(dtype, activation, biased=biased, rows=rows, size=size, outputs=outputs))


@pytest.mark.parametrize("one", OPERATOR.implementations, ids=lambda one: one.name)
def test_saturated(one) -> None:
    s, weight, bias, alpha, mean, rate, _ = arguments(torch.float32, rows=9, size=5, outputs=3)
    conforms(OPERATOR, one, (s, weight, bias, alpha, mean, rate * 1e4, "dice"))
    conforms(OPERATOR, one, (s * 1e4, weight, bias, None, None, None, "sigmoid"))


@pytest.mark.parametrize("activation", KINDS)
def test_gradients(activation) -> None:
    *values, _ = arguments(torch.float64, activation, rows=4, size=3, outputs=2)
    values = [None if v is None else v.requires_grad_() for v in values]
    assert OPERATOR.chosen(*values, activation) == "cpu"
    assert torch.autograd.gradcheck(lambda *v: OPERATOR(*v, activation), values)


def test_statistics_of_the_batch_pass_their_gradients_on() -> None:
    s, weight, bias, alpha, *_ = arguments(torch.float64, rows=6, size=3, outputs=2)

    def layer(s, alpha):
        variance, mean = torch.var_mean(s, 0, correction=0)
        rate = (variance + 1e-8).rsqrt()
        return activated_linear(s, weight, bias, activation="dice", alpha=alpha, mean=mean, rate=rate)

    assert torch.autograd.gradcheck(layer, (s.requires_grad_(), alpha.requires_grad_()))
