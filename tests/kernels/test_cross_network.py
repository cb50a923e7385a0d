from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from kernels import cross_network
from kernels.cross_network import NARROW, ONE_LAUNCH, OPERATOR
from kernels.dispatch import Operator
from tests.kernels.conformance import conforms, examples

SHAPES = {
    "rows": st.integers(0, 130),
    "width": st.integers(1, 40),
    "layers": st.integers(1, 3),
    "gated": st.booleans(),
    "biased": st.booleans(),
}


def test_it_is_the_layers_one_after_the_other() -> None:
    c0, weights, biases, gates = examples(OPERATOR, torch.float64, rows=5, width=3, layers=2)
    c = c0
    for weight, bias, gate in zip(weights, biases, gates, strict=True):
        c = c0 * (c @ weight.T + bias) * torch.sigmoid(c @ gate.T) + c
    for fused in (True, False):
        torch.testing.assert_close(cross_network(c0, list(weights), list(biases), list(gates), fused=fused), c)
    torch.testing.assert_close(OPERATOR(c0, weights, biases, gates), c)


def test_without_gates_it_is_that_of_dcnv2() -> None:
    c0, weights, _, _ = examples(OPERATOR, torch.float64, rows=5, width=3, layers=2)
    c1 = c0 * (c0 @ weights[0].T) + c0
    torch.testing.assert_close(cross_network(c0, list(weights)), c0 * (c1 @ weights[1].T) + c1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(**SHAPES)
@example(rows=4097, width=3, layers=2, gated=True, biased=True)
@settings(max_examples=6, phases=[Phase.explicit, Phase.generate])
def test_one_launch(dtype, rows, width, layers, gated, biased) -> None:
    if dtype == torch.bfloat16:  # in sums of a column or two what is rounded does not cancel
        width, layers = width + 2, 1  # and the error grows with each layer: see below
    c0, weights, biases, gates = examples(OPERATOR, dtype, rows=rows, width=width, layers=layers)
    conforms(OPERATOR, ONE_LAUNCH, (c0, weights, biases if biased else None, gates if gated else None))


@pytest.mark.parametrize(("rows", "width", "layers"), [(30, 17, 2), (130, 40, 2), (30, 5, 3), (130, 17, 3)])
def test_in_bfloat16_layers_add_up_no_more_error_than_those_of_the_definition(rows, width, layers) -> None:
    drawn = examples(OPERATOR, torch.bfloat16, rows=rows, width=width, layers=layers)
    gradient = torch.randn(rows, width, generator=torch.Generator().manual_seed(1)).bfloat16()

    def computed(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        leaves = [one.to(dtype).requires_grad_() for one in drawn]
        result = OPERATOR.reference(*leaves)
        return result.detach(), *torch.autograd.grad(result, leaves, gradient.to(dtype))

    ours = (*ONE_LAUNCH.forward(*drawn), *ONE_LAUNCH.backward(gradient, *drawn))
    for exact, usual, found in zip(computed(torch.float64), computed(torch.bfloat16), ours, strict=True):
        size = exact.abs().max().clamp_min(1)
        off, expected = (float((one - exact).abs().max() / size) for one in (found, usual))
        assert off <= max(0.01, expected)


def test_saturated_gates() -> None:
    c0, weights, biases, gates = examples(OPERATOR, torch.float32, rows=9, width=5, layers=2)
    conforms(OPERATOR, ONE_LAUNCH, (c0, weights, biases, gates * 1e4))


def test_gradients() -> None:
    """Layer by layer, as on CPU."""
    values = tuple(v.requires_grad_() for v in examples(OPERATOR, torch.float64, rows=3, width=2, layers=2))
    assert torch.autograd.gradcheck(cross_network, values)


@pytest.mark.parametrize("dtype", NARROW)
def test_rows_too_wide_for_one_program_go_layer_by_layer(dtype: torch.dtype) -> None:
    for width, taken in ((NARROW[dtype], True), (NARROW[dtype] + 1, False)):
        c0, weights = torch.empty(3, width, dtype=dtype), torch.empty(2, width, width, dtype=dtype)
        assert ONE_LAUNCH.allows(c0, weights, None, None) is taken


@pytest.mark.parametrize("given", [(True, True), (False, True), (False, False)])
def test_where_one_launch_takes_the_layers_it_is_called(monkeypatch, given) -> None:
    """Triton's interpreter stands in for a GPU."""
    calls = []

    def forward(*arguments):
        calls.append(arguments)
        return ONE_LAUNCH.forward(*arguments)

    here = replace(ONE_LAUNCH, device="cpu", forward=forward, outputs=None)
    module = "kernels.cross_network"
    monkeypatch.setattr(sys.modules[module], "ONE_LAUNCH", here)
    monkeypatch.setattr(
        sys.modules[module], "OPERATOR", Operator("here", OPERATOR.reference, OPERATOR.schema, [here])
    )
    c0, *stacks = examples(OPERATOR, torch.float32, rows=5, width=3, layers=2)
    lists = [[one.requires_grad_() for one in stack.unbind()] for stack in stacks]
    present = [lists[0], *(one if there else None for one, there in zip(lists[1:], given, strict=True))]
    leaves = [one for some in present for one in some or ()]
    slopes = [
        torch.autograd.grad(cross_network(c0, *present, fused=fused).sin().sum(), leaves) for fused in (True, False)
    ]
    assert len(calls) == 1
    for found, expected in zip(*slopes, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
