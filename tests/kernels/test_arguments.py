"""Whatever strides and shapes arguments have, an implementation is right or leaves them to the definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import OPERATORS
from kernels.dispatch import Implementation, Operator
from tests.kernels.conformance import CALLS, SIZES, conforms, turned, variants, wants_gradient

EVERY_CALL = pytest.mark.parametrize(("operator", "one", "sizes"), CALLS)
ON_CPU = {
    name: operator
    for name, operator in OPERATORS.items()
    if any(one.device == "cpu" for one in operator.implementations)
}


def spread(argument: Any) -> Any:
    """The same numbers, none beside the next."""
    if not isinstance(argument, Tensor) or not argument.dim():
        return argument
    return argument.new_empty(*argument.shape, 2).fill_(7)[..., 0].copy_(argument)


@EVERY_CALL
@pytest.mark.parametrize("laid", [spread, turned])
def test_any_strides(operator: Operator, one: Implementation, sizes, laid) -> None:
    for arguments in variants(operator, torch.float32, sizes):
        views = tuple(laid(a) for a in arguments)
        assert any(a is not b for a, b in zip(arguments, views, strict=True))
        if one.allows(*views):
            conforms(operator, one, views)
        else:
            assert operator.name in ("bilinear_fusion", "gated_embedding")  # whose docstrings say so


@EVERY_CALL
def test_shapes_that_do_not_fit_are_left_to_the_definition(operator: Operator, one: Implementation, sizes) -> None:
    """It tells what is wrong; a kernel would read what is not there."""
    for arguments in variants(operator, torch.float32, sizes):
        for place, argument in enumerate(arguments):
            if not isinstance(argument, Tensor):
                continue
            for shape in wrong_shapes(argument.shape):
                given = (*arguments[:place], argument.new_zeros(shape), *arguments[place + 1 :])
                by_value = shape[1:] == argument.shape[1:] and place in TOLD_BY_OFFSETS.get(operator.name, ())
                if one.allows(*given) and not by_value:
                    assert one.forward(*given)[0].shape == operator.reference(*given).shape, (place, shape)


TOLD_BY_OFFSETS = {
    "jagged_pool": (2,),
    "linear_attention": (4,),
    "linear_state": (3,),
    "scores": (1, 2),
    "target_layer": (0, 1),
}
"""Places of offsets, and of arguments of which only the offsets' values tell the number of rows."""


def wrong_shapes(shape: torch.Size) -> list[tuple[int, ...]]:
    """One number more or less in each dimension, and a dimension more."""
    by = [
        tuple(n + more * (d == dim) for d, n in enumerate(shape)) for dim in range(len(shape)) for more in (1, -1)
    ]
    return [*by, (*shape, 2)]


def test_half_of_the_inputs_may_need_no_gradient() -> None:
    for name, operator in ON_CPU.items():
        arguments = variants(operator, torch.float64, SIZES[name][0])[0]
        places = list(enumerate(arguments))
        floats = [p for p, a in places if isinstance(a, Tensor) and a.is_floating_point()]
        for chosen in (floats[:1], floats[-1:]):
            slopes = []
            for fused in (True, False):
                leaves = [a.detach().requires_grad_(p in chosen) if p in floats else a for p, a in places]
                result = operator(*leaves, fused=fused)
                if result.requires_grad:
                    result.sin().sum().backward()
                slopes.append([leaves[p].grad for p in floats])
            for found, expected in zip(*slopes, strict=True):
                assert (found is None) == (expected is None)
                if found is not None:
                    torch.testing.assert_close(found, expected)


def test_a_second_derivative_is_refused_in_words() -> None:
    for name, operator in ON_CPU.items():
        arguments = variants(operator, torch.float64, SIZES[name][0])[0]
        leaves = [wants_gradient(a) for a in arguments]
        assert operator.chosen(*leaves) == "cpu"
        (slope,) = torch.autograd.grad(operator(*leaves).square().sum(), leaves[0], create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            slope.sum().backward()


def test_results_may_be_changed_in_place() -> None:
    for name, operator in ON_CPU.items():
        arguments = variants(operator, torch.float64, SIZES[name][0])[0]
        leaves = [wants_gradient(a) for a in arguments]
        operator(*leaves).mul_(2).sum().backward()
        assert leaves[0].grad is not None
