"""What torch.compile and export are told about an implementation is what it returns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels import OPERATORS
from kernels.dispatch import Implementation, Operator
from tests.kernels.conformance import examples

EXPERTS = {"rows": 3, "experts": 2, "inner": 4, "outer": 3}
SIZES: dict[str, list[dict[str, int]]] = {
    "activated_linear": [{"rows": 3, "size": 4, "outputs": 2}],
    "bilinear_fusion": [{"rows": 3, "heads": 2, "d1": 4, "d2": 6}],
    "expert_mixture": [
        {**EXPERTS, "mixed": 1},
        {**EXPERTS, "mixed": 1, "shared": 1, "top": 1},
        {**EXPERTS, "mixed": 0, "relu": 1, "top": 1},
        {**EXPERTS, "mixed": 0, "shared": 1},
    ],
    "feature_gate": [
        {"rows": 3, "units": 4, "hidden": 2},
        {"rows": 3, "units": 4, "hidden": 2, "each": 2, "shared": 1},
    ],
    "gated_cross": [{"rows": 3, "width": 4}],
    "gated_embedding": [{"rows": 5, "values": 4, "width": 3}],
    "jagged_pool": [{"rows": 2, "width": 3}],
    "linear_attention": [{"rows": 2, "width": 3}],
    "linear_state": [{"rows": 2, "width": 3}],
    "scores": [{"users": 2, "each": 3, "shared": 4, "own": 5, "hidden": 6}],
    "target_layer": [{"rows": 2, "width": 3, "hidden": 4}],
}
CALLS = [
    pytest.param(operator, one, sizes, id=f"{name}-{one.name}-{number}")
    for name, operator in OPERATORS.items()
    for one in operator.implementations
    for number, sizes in enumerate(SIZES[name])
]


def variants(operator: Operator, dtype: torch.dtype, sizes: dict[str, int]) -> list[tuple[Any, ...]]:
    """The arguments as drawn; all optional tensors left out; a softmax instead of plain weights."""
    drawn = list(examples(operator, dtype, seed=1, **sizes))
    kinds = [part.split()[0] for part in operator.schema.split(", ")]
    found = [tuple(drawn)]
    optional = [place for place, kind in enumerate(kinds) if kind == "Tensor?" and drawn[place] is not None]
    if optional:
        plain = [None if place in optional else a for place, a in enumerate(drawn)]
        found.append(tuple("relu" if isinstance(a, str) and a == "dice" else a for a in plain))
    if operator.name == "jagged_pool":
        found.append((*drawn[:-1], True))
    return found


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


@pytest.mark.parametrize(("operator", "one", "sizes"), CALLS)
def test_nothing_returned_shares_memory(operator: Operator, one: Implementation, sizes) -> None:
    """An operator of torch may not return an argument, a view of one, or the same tensor twice."""
    if not one.outputs:
        pytest.skip("no operator of torch")
    for arguments in variants(operator, torch.float32, sizes):
        tensors = [a for a in (*arguments, *one.forward(*arguments)) if isinstance(a, Tensor) and a.numel()]
        assert len({t.untyped_storage().data_ptr() for t in tensors}) == len(tensors)


def test_every_operator_is_called() -> None:
    assert SIZES.keys() == OPERATORS.keys()
    assert all(one.outputs for o in OPERATORS.values() for one in o.implementations if one.device == "cuda")
