from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from kernels import gated_cross
from kernels.gated_cross import OPERATOR, WIDE, both_products
from tests.kernels.conformance import conforms, examples

EVERY = pytest.mark.parametrize("one", OPERATOR.implementations, ids=lambda one: one.name)
SHAPES = {"rows": st.integers(0, 130), "width": st.integers(1, 70), "gated": st.booleans(), "biased": st.booleans()}


def test_it_is_the_equation() -> None:
    c0, c, weight, bias, gate = examples(OPERATOR, torch.float64, rows=5, width=3)
    expected = c0 * (c @ weight.T + bias) * torch.sigmoid(c @ gate.T) + c
    torch.testing.assert_close(gated_cross(c0, c, weight, bias, gate), expected)


def test_without_a_gate_it_is_the_cross_layer_of_dcnv2() -> None:
    c0, c, weight, bias, _ = examples(OPERATOR, torch.float64, rows=5, width=3)
    torch.testing.assert_close(gated_cross(c0, c, weight, bias), c0 * (c @ weight.T + bias) + c)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("triton", torch.float32),
        ("triton", torch.bfloat16),
        ("epilogue", torch.float32),
        ("epilogue", torch.bfloat16),
        ("cpu", torch.float32),
    ],
)
@given(**SHAPES)
@example(rows=4097, width=3, gated=True, biased=True)
@settings(max_examples=6, phases=[Phase.explicit, Phase.generate])
def test_every_implementation(name, dtype, rows, width, gated, biased) -> None:
    if dtype == torch.bfloat16:  # in sums of a column or two what is rounded does not cancel
        width += 2
    c0, c, weight, bias, gate = examples(OPERATOR, dtype, rows=rows, width=width)
    one = next(one for one in OPERATOR.implementations if one.name == name)
    conforms(OPERATOR, one, (c0, c, weight, bias if biased else None, gate if gated else None))


@given(**{**SHAPES, "rows": st.integers(0, 4097)})
@settings(max_examples=4, phases=[Phase.explicit, Phase.generate])
def test_many_rows_on_cpu(rows, width, gated, biased) -> None:
    c0, c, weight, bias, gate = examples(OPERATOR, torch.float32, rows=rows, width=width)
    one = next(one for one in OPERATOR.implementations if one.name == "cpu")
    conforms(OPERATOR, one, (c0, c, weight, bias if biased else None, gate if gated else None))


@EVERY
def test_saturated_gates(one) -> None:
    c0, c, weight, bias, gate = examples(OPERATOR, torch.float32, rows=9, width=5)
    conforms(OPERATOR, one, (c0, c, weight, bias, gate * 1e4))


def test_gradients() -> None:
    values = tuple(v.requires_grad_() for v in examples(OPERATOR, torch.float64, rows=3, width=2))
    assert OPERATOR.chosen(*values) == "cpu"
    assert torch.autograd.gradcheck(gated_cross, values)


@pytest.mark.parametrize(("width", "name"), [(WIDE, "triton"), (WIDE + 1, "epilogue")])
def test_products_of_wide_layers_are_left_to_torch(width: int, name: str) -> None:
    with torch.device("meta"):
        c, square = torch.empty(3, width), torch.empty(width, width)
    taken = [one.name for one in OPERATOR.implementations if one.outputs and one.allows(c, c, square, c[0], square)]
    assert taken[0] == name


@pytest.mark.parametrize("rows", [7, 8])  # W and G are stacked from 4 D on
def test_both_products(rows: int) -> None:
    _, c, weight, _, gate = examples(OPERATOR, torch.float64, rows=rows, width=2)
    expected = torch.cat((c @ weight.T, c @ gate.T), dim=1)
    torch.testing.assert_close(both_products(c, weight, gate), expected)
    torch.testing.assert_close(both_products(c, weight, None), c @ weight.T)
