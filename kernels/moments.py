"""Mean and variance of each column, as an activation with statistics needs them in training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.jagged import blocks


def moments(s: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and (biased) variance of each column, keeping nothing of the size of ``s`` but ``s``.

    On CPU, torch's own ``var_mean`` goes down each column by itself. Two passes over blocks of whole rows read the
    same memory in its order, and are as exact.

    Args:
        s: (N, h); of no rows, mean and variance are 0.

    Returns:
        Mean and variance, (h,) each.

    Example:
        >>> moments(torch.tensor([[1.0, 4.0], [3.0, 4.0]]))
        (tensor([2., 4.]), tensor([1., 0.]))
    """
    if not s.shape[0]:
        return s.sum(0), s.sum(0)
    if s.device.type != "cpu" or torch.compiler.is_compiling():
        variance, mean = torch.var_mean(s, 0, correction=0)
        return mean, variance
    return _Moments.apply(s)  # type: ignore[no-any-return]


class _Moments(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, s: Tensor) -> tuple[Tensor, Tensor]:
        mean = s.mean(0)
        # In bfloat16 a sum of many blocks would no longer take up the next one.
        variance = torch.zeros_like(mean, dtype=torch.promote_types(s.dtype, torch.float32))
        for part in blocks(*s.shape):
            variance += (s[part] - mean).square_().sum(0, dtype=variance.dtype)
        ctx.save_for_backward(s, mean)
        return mean, variance.div_(s.shape[0]).to(s.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, of_mean: Tensor, of_variance: Tensor) -> Tensor:
        s, mean = ctx.saved_tensors
        in_s, share = torch.empty_like(s), 1 / s.shape[0]
        for part in blocks(*s.shape):
            torch.sub(s[part], mean, out=in_s[part]).mul_(of_variance * (2 * share)).add_(of_mean, alpha=share)
        return in_s
