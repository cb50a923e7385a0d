"""Fusion of two streams."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ctr_models.errors import ConfigError
from kernels import bilinear_fusion


class BilinearFusion(nn.Module):
    """One number from two streams: b + w1 . o1 + w2 . o2 + sum over heads h of o1_h' W_h o2_h.

    The d1 d2 / k products of all heads feed one number, so their weights start Xavier-normal with that fan-in:
    std = sqrt(2 / (d1 d2 / k + 1)), and the first logits are of order 1. Xavier by the size of a head, which
    looks natural, makes them some ten times larger (d1 d2 / k is 16,000 for two streams of 400 and ten heads)
    and training starts from a loss above 2. The official code holds the bias twice; here it stands once.

    Args:
        d1: width of the first stream.
        d2: width of the second.
        heads: k, a divisor of both.

    Raises:
        ConfigError: k does not divide both widths; the message names those that do.

    Example:
        >>> BilinearFusion(8, 4, heads=2)(torch.zeros(3, 8), torch.zeros(3, 4)).shape
        torch.Size([3])

    Source: FinalMLP, arXiv 2304.00902.
    """

    fused: bool = True
    """Whether a fast operator may run; ``model.kernels`` of the model sets it."""

    def __init__(self, d1: int, d2: int, *, heads: int) -> None:
        super().__init__()
        if heads < 1 or d1 % heads or d2 % heads:
            valid = [k for k in range(1, min(d1, d2) + 1) if d1 % k == 0 and d2 % k == 0]
            raise ConfigError(
                f"{heads} heads don't divide streams of {d1} and {d2}",
                where="model.heads",
                remedy=f"one of {valid}",
            )
        self.weight = nn.Parameter(torch.empty(heads, d1 // heads, d2 // heads))
        self.w1 = nn.Parameter(torch.empty(d1))
        self.w2 = nn.Parameter(torch.empty(d2))
        self.bias = nn.Parameter(torch.zeros(()))
        nn.init.normal_(self.weight, std=(2 / (d1 * d2 // heads + 1)) ** 0.5)
        nn.init.xavier_normal_(self.w1.data.view(1, -1))
        nn.init.xavier_normal_(self.w2.data.view(1, -1))

    def forward(self, o1: Tensor, o2: Tensor) -> Tensor:
        """Map (B, d1) and (B, d2) to (B,)."""
        return bilinear_fusion(o1, o2, self.weight, self.w1, self.w2, self.bias, fused=self.fused)
