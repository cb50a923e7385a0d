"""Holds every implementation of an operator against its definition in double precision."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.dispatch import Implementation, Operator

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Largest difference, as a share of the largest number of the exact result (of 1, where that is smaller)."""


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
