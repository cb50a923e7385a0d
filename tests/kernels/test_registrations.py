"""What torch.compile and export are told about an implementation is what it returns."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels import OPERATORS
from kernels.dispatch import Implementation, Operator
from tests.kernels.conformance import CALLS, SIZES, turned, variants, wants_gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("operator", "one", "sizes"), CALLS)
def test_shapes_and_types_are_as_registered(operator: Operator, one: Implementation, sizes, dtype) -> None:
    taken = [a for a in variants(operator, dtype, sizes) if one.allows(*a)]
    assert taken or one.name == "cpu"
    for arguments in taken:
        returned = one.forward(*arguments)
        if one.outputs:
            assert len(returned) == one.returns
            with FakeTensorMode(allow_non_fake_inputs=False) as mode:
                told = one.outputs(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments))
            assert _described(told) == _described(returned)
        gradients = one.backward(torch.ones_like(returned[0]), *arguments, *returned[1:])
        assert len(gradients) == len(arguments)
        for argument, gradient in zip(arguments, gradients, strict=True):
            if gradient is not None:
                assert _described([gradient]) == _described([argument])


def _described(tensors: Any) -> list[tuple[tuple[int, ...], torch.dtype]]:
    return [(tuple(t.shape), t.dtype) for t in tensors]


TWINS = {
    name: Operator(
        f"{name}_here",
        operator.reference,
        operator.schema,
        [replace(one, device="cpu") for one in operator.implementations if one.outputs],
    )
    for name, operator in OPERATORS.items()
}
"""The same with Triton's implementations on CPU, by its interpreter."""


@pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="runs where Triton has no GPU")
@pytest.mark.parametrize(("operator", "one", "sizes"), [call for call in CALLS if call.values[1].outputs])
def test_torch_takes_it_as_an_operator(operator: Operator, one: Implementation, sizes) -> None:
    """Its results and their strides, its gradients, also traced; nothing that it returns shares memory."""
    twin = TWINS[operator.name]
    for number, arguments in enumerate(variants(operator, torch.float32, sizes)):
        laid = arguments if number else tuple(turned(a) for a in arguments)
        leaves = [wants_gradient(a) for a in laid]
        torch.library.opcheck(getattr(torch.ops.sluice, f"{twin.name}_{one.name}").default, leaves)


@pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="runs where Triton has no GPU")
@pytest.mark.parametrize("name", ["feature_gate", "gated_cross"])  # of one result, and of several
def test_compiled_it_is_called_and_gives_the_same(name: str) -> None:
    torch._dynamo.reset()
    arguments = [wants_gradient(a) for a in variants(OPERATORS[name], torch.float32, SIZES[name][0])[0]]
    results = []
    for way in (torch.compile(TWINS[name], fullgraph=True, backend="aot_eager"), OPERATORS[name].reference):
        result = way(*arguments)
        results.append((result, *torch.autograd.grad(result.sin().sum(), arguments)))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_every_operator_is_called() -> None:
    assert SIZES.keys() == OPERATORS.keys()
    assert all(one.outputs for o in OPERATORS.values() for one in o.implementations if one.device == "cuda")
