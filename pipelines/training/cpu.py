"""What torch does slowly when it trains on CPU, done faster: the same mathematics in float32, the same parameters.

torch multiplies float32 matrices by MKL, which on AMD processors reaches less than half of what oneDNN does, and it
draws the numbers for dropout one by one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kernels.product import fast_products, product, summed_product


class _Product(torch.autograd.Function):
    """x W^T + b and its gradients, all three products the faster way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.biased = bias is not None
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        grad = grads[0].contiguous()  # (B, O)
        to_x = product(grad, weight.t()) if ctx.needs_input_grad[0] else None  # (B, I)
        to_weight = summed_product(grad, x) if ctx.needs_input_grad[1] else None  # (O, I)
        to_bias = grad.sum(0) if ctx.biased and ctx.needs_input_grad[2] else None
        return to_x, to_weight, to_bias


class FastLinear(nn.Linear):
    """nn.Linear by oneDNN, for (B, I) float32 on CPU, B above 0; anything else goes the usual way."""

    def forward(self, input: Tensor) -> Tensor:
        """Map (B, I) to (B, O)."""
        if input.ndim != 2 or not len(input) or input.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
            return super().forward(input)
        return _Product.apply(input.contiguous(), self.weight, self.bias)


class FastDropout(nn.Dropout):
    """nn.Dropout with four decisions from each random number, for float32 on CPU.

    The rate is rounded to a multiple of 2^-16, and the kept values are scaled by what was rounded.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Drop values of a tensor of any shape."""
        dropped = round(self.p * 65536)
        if not self.training or self.inplace or not 0 < dropped < 65536:
            return super().forward(input)
        words = torch.empty(-(-input.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        lots = words.view(torch.int16)[: input.numel()].view(input.shape)
        mask = (lots >= dropped - 32768).to(input.dtype).mul_(65536 / (65536 - dropped))
        return input * mask


def speed_up(model: nn.Module) -> None:
    """Train the model's layers the fast way, in place; parameters, names and results in evaluation stay.

    Results agree with torch's own to the rounding of float32. Dropout draws other numbers.

    Args:
        model: on CPU.
    """
    if not fast_products():
        return
    fast = {nn.Linear: FastLinear, nn.Dropout: FastDropout}
    for module in model.modules():
        module.__class__ = fast.get(type(module), type(module))  # type: ignore[assignment]
