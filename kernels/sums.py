"""Sums over the rows of a batch, as gradients of weights are."""

from __future__ import annotations

from torch import Tensor

FEW = 16
"""Numbers of a result up to which it is summed in doubles."""


def summed_product(a: Tensor, b: Tensor) -> Tensor:
    """Return a' b, a sum over all rows; in doubles where it is of few numbers.

    A sum over thousands of rows may come out close to zero, and one number alone then shows all rounding on its
    way there. Among many numbers there are large ones, beside which it does not count. For few, doubles cost
    nothing that can be measured.

    Args:
        a: (B, m).
        b: (B, n).

    Returns:
        (m, n), of the type of ``a``.

    Example:
        >>> import torch
        >>> summed_product(torch.tensor([[3e8], [1.0], [-3e8]]), torch.ones(3, 1))
        tensor([[1.]])
    """
    if a.shape[1] * b.shape[1] > FEW:
        return a.T @ b
    return (a.double().T @ b.double()).to(a.dtype)
