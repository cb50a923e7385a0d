"""DIN's data-adaptive activation."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels.moments import moments


class Dice(nn.Module):
    """f(s) = p s + (1 - p) alpha s, p = sigmoid((s - E[s]) / sqrt(Var[s] + eps)), coordinate by coordinate.

    E and Var are those of the batch in training and moving averages in evaluation; alpha is learned and starts at
    zero. On jagged values every row is a real one: no padding is counted. A batch of less than two rows has no
    variance, and is normalised by the moving averages.

    Differences from the official code: the batch's own statistics are used in training, where the official code
    never leaves those it starts with.

    Args:
        size: number of coordinates.
        eps: added to the variance.
        momentum: weight of the newest batch in the moving averages.

    Example:
        >>> Dice(2).eval()(torch.tensor([[0.0, 100.0], [-100.0, 0.0]])).round().tolist()
        [[0.0, 100.0], [-0.0, 0.0]]

    Source: DIN, arXiv 1706.06978.
    """

    mean: Tensor
    variance: Tensor

    def __init__(self, size: int, *, eps: float = 1e-8, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.alpha = nn.Parameter(torch.zeros(size))
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("variance", torch.ones(size))

    def statistics(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """Return E[s] and 1 / sqrt(Var[s] + eps), (size,) each; in training, take note of them."""
        mean, variance = self.mean, self.variance
        if self.training and s.shape[0] > 1:
            mean, variance = moments(s.to(torch.promote_types(s.dtype, torch.float32)))
            with torch.no_grad():
                self.mean.lerp_(mean.to(self.mean.dtype), self.momentum)
                unbiased = variance * (s.shape[0] / (s.shape[0] - 1))
                self.variance.lerp_(unbiased.to(self.variance.dtype), self.momentum)
        return mean.to(s.dtype), (variance + self.eps).rsqrt().to(s.dtype)

    def forward(self, s: Tensor) -> Tensor:
        """Map (N, size) to (N, size)."""
        own = self.training and s.shape[0] > 1
        p = torch.sigmoid(F.batch_norm(s, self.mean, self.variance, None, None, own, self.momentum, self.eps))
        return s * torch.addcmul(self.alpha, 1 - self.alpha, p)
