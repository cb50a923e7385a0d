"""Holds every implementation of an operator against its definition in double precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import OPERATORS
from kernels.dispatch import Implementation, Operator

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Largest difference, as a share of the largest number of the exact result (of 1, where that is smaller)."""


EXPERTS = {"rows": 3, "experts": 2, "inner": 4, "outer": 3}
SIZES: dict[str, list[dict[str, int]]] = {
    "activated_linear": [{"rows": 3, "size": 4, "outputs": 2}],
    "bilinear_fusion": [{"rows": 3, "heads": 2, "d1": 4, "d2": 6}],
    "cross_network": [{"rows": 3, "width": 4, "layers": 2}],
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
    "jagged_pool": [{"rows": 2, "width": 3, "mean": 2}],
    "linear_attention": [{"rows": 2, "width": 3, "mean": 2}],
    "linear_state": [{"rows": 2, "width": 3, "mean": 2}],
    "scores": [{"users": 2, "each": 3, "shared": 4, "own": 5, "hidden": 6}],
    "target_layer": [{"rows": 2, "width": 3, "hidden": 4, "mean": 2}],
}
"""Of small examples of each operator."""
CALLS = [
    pytest.param(operator, one, sizes, id=f"{name}-{one.name}-{number}")
    for name, operator in OPERATORS.items()
    for one in operator.implementations
    for number, sizes in enumerate(SIZES[name])
]
"""Every implementation of every operator with each of its sizes."""


def examples(operator: Operator, dtype: torch.dtype, *, seed: int = 0, **sizes: int) -> tuple[Any, ...]:
    """Return arguments of these sizes on CPU, where Triton's interpreter runs too."""
    assert operator.workload is not None
    return operator.workload.make(torch.Generator().manual_seed(seed), "cpu", dtype, **sizes)


def jagged(lengths: list[int], width: int, dtype: torch.dtype, *, seed: int = 2) -> tuple[Tensor, Tensor]:
    """Return values of rows of these lengths, (T, width), and the rows' offsets."""
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return torch.randn(sum(lengths), width, generator=torch.Generator().manual_seed(seed)).to(dtype), offsets


def conforms(
    operator: Operator, one: Implementation, arguments: tuple[Any, ...], tolerance: float | None = None
) -> None:
    """Assert that result and gradients are those of the definition, and the same bits when computed again."""
    floats = [p for p, a in enumerate(arguments) if isinstance(a, Tensor) and a.is_floating_point()]
    exact = [a.detach().double().requires_grad_() if p in floats else a for p, a in enumerate(arguments)]
    assert one.allows(*arguments), f"{one.name} does not take {arguments[floats[0]].dtype}"
    tolerance = tolerance or TOLERANCE[arguments[floats[0]].dtype]
    expected = operator.reference(*exact)
    gradient = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(
        arguments[floats[0]].dtype
    )
    slopes = torch.autograd.grad(expected, [exact[p] for p in floats], gradient.double(), allow_unused=True)

    result, *kept = one.forward(*arguments)
    again, *_ = one.forward(*arguments)
    assert torch.equal(result, again), "two calls differ"
    _near(result, expected.detach(), tolerance, "result")
    found = one.backward(gradient.to(result.dtype), *arguments, *kept)
    for place, slope in zip(floats, slopes, strict=True):
        if slope is not None:
            assert found[place] is not None, f"no gradient for argument {place}"
            _near(found[place], slope, tolerance, f"gradient of argument {place}")


def _near(found: Tensor, exact: Tensor, tolerance: float, what: str) -> None:
    assert found.shape == exact.shape, f"{what}: {tuple(found.shape)} instead of {tuple(exact.shape)}"
    assert bool(found.isfinite().all()), f"{what} is not finite"
    if exact.numel():
        size = max(float(exact.abs().max()), 1.0)
        worst = float((found.double() - exact).abs().max()) / size
        assert worst <= tolerance, f"{what} is off by {worst:.2e} of its size, {tolerance:.0e} is allowed"


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


def wants_gradient(argument: Any) -> Any:
    """Return a leaf of the same numbers where it can have a gradient."""
    if isinstance(argument, Tensor) and argument.is_floating_point():
        return argument.detach().requires_grad_()
    return argument


def turned(argument: Any) -> Any:
    """Return a matrix as the transpose of another, whose strides torch's ``empty_like`` copies."""
    return argument.mT.contiguous().mT if isinstance(argument, Tensor) and argument.dim() > 1 else argument
