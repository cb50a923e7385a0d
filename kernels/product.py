"""Matrix products: on CPU by the faster of torch's two libraries, elsewhere torch's own; no gradients."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

LEAST = 16
"""With fewer columns on either side oneDNN is no faster."""
WORTH = 2**21
"""Multiplications from which oneDNN saves more than the 13 microseconds that its preparation costs.

With one thread it does so from half as many on. The same number for any threads gives the same bits.
"""
WIDE = 2**15
"""Numbers of a sum over rows from which oneDNN is faster, of four times as many multiplications."""
FEW = 16
"""Numbers of a sum over rows up to which it is taken in doubles."""


def fast_products() -> bool:
    """Whether this processor gains from oneDNN: one with AVX-512, which oneDNN uses whoever made it.

    MKL, by which torch multiplies float32 matrices, reaches less than half of oneDNN's rate on AMD processors.
    """
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.backends.mkldnn.is_available()


_FAST = fast_products()


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x W^T + b.

    Args:
        x: (N, I).
        weight: W, (O, I); a transposed view is as fast.
        bias: b, (O,); None stands for 0.

    Returns:
        (N, O).

    Example:
        >>> product(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0], [5.0, 6.0]]), torch.tensor([0.0, 1.0]))
        tensor([[11., 18.]])
    """
    if not _suits(x, weight):
        return F.linear(x, weight, bias)
    # A product with a slice of wider rows, as a chunk is, takes oneDNN up to a hundred times as long.
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")


def summed_product(a: Tensor, b: Tensor) -> Tensor:
    """Return a' b, a sum over all rows, as a weight's gradient is; in doubles where it is of few numbers.

    A sum over thousands of rows may come out close to zero, and one number alone then shows all rounding on its
    way there. Among many numbers there are large ones, beside which it does not count. For few, doubles cost
    nothing that can be measured.

    Args:
        a: (N, m).
        b: (N, n).

    Returns:
        (m, n), contiguous, of the type of ``a``.

    Example:
        >>> summed_product(torch.tensor([[3e8], [1.0], [-3e8]]), torch.ones(3, 1))
        tensor([[1.]])
    """
    size = a.shape[1] * b.shape[1]
    if size <= FEW:
        return (a.double().T @ b.double()).to(a.dtype)
    if size < WIDE or size * a.shape[0] < 4 * WORTH or not _suits(a.T, b.T):
        return a.T @ b
    a, b = a.contiguous(), b.contiguous()
    # oneDNN is up to twice as fast with the narrower matrix first.
    if a.shape[1] <= b.shape[1]:
        return torch.ops.mkldnn._linear_pointwise(a.T, b.T, None, "none", [], "")
    return torch.ops.mkldnn._linear_pointwise(b.T, a.T, None, "none", [], "").T.contiguous()


def _suits(x: Tensor, weight: Tensor) -> bool:
    return (
        _FAST
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.dim() == 2
        and x.shape[1] >= LEAST
        and weight.shape[0] >= LEAST
        and x.shape[0] * weight.numel() >= WORTH
    )
