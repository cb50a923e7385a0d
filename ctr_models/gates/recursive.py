"""A cross gate that looks at products of its context."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from ctr_models.gates.base import Gate, GateConfig, GateShape, register_gate
from ctr_models.layers.mlp import linear


class RecursiveConfig(GateConfig):
    """Settings of gate ``recursive``."""

    order: int = Field(3, ge=1)
    """n: the logits hold products of up to n + 1 coordinates of the context."""
    alpha: float = Field(3.0, gt=0)
    """Divides each product."""


@register_gate("recursive")
class RecursiveGate(Gate):
    """mask = sigmoid(W p_n), where the order grows with each step:

        [p_0, q_0, ..., q_{n-1}] = U c + b,    p_{k+1} = q_k * g_k(p_k) / alpha.

    g_0 is the identity and g_k linear. The widths double from step to step, D / 2^(n-1) to D, so that all steps
    together cost about as much as two of full width. c is the context, or ``x`` if none is given. GDCN's gate is
    linear in c; this one sees interactions.

    The biases of the q start at alpha: c is close to 0 when embeddings are fresh, and a product of n + 1 such
    numbers would learn nothing. The logits thus start linear in c, and the higher orders grow from there.
    ``start: identity`` doubles the mask and starts W at zero; its range is then [0, 2].

    Differences from the paper: a vector has no neighbours, so that the depth-wise convolutions of the q are left
    out; and p_n decides a mask, where in HorNet it is the output.

    Example:
        >>> from ctr_models.gates import GateShape, GateSpec
        >>> gate = GateSpec(name="recursive").build(GateShape(slot="cross", width=8))
        >>> gate.widths
        [2, 4, 8]
        >>> gate(torch.ones(3, 8)).shape
        torch.Size([3, 8])

    Source: HorNet, arXiv 2207.14284.
    """

    slots = frozenset({"cross"})
    Config = RecursiveConfig
    config: RecursiveConfig
    source = "arXiv 2207.14284"

    def __init__(self, config: RecursiveConfig, shape: GateShape) -> None:
        super().__init__(config, shape)
        order = config.order
        self.widths = [max(1, shape.width // 2 ** (order - 1 - k)) for k in range(order)]
        self.inputs = linear(shape.context or shape.width, self.widths[0] + sum(self.widths))
        nn.init.constant_(self.inputs.bias[self.widths[0] :], config.alpha)
        self.steps = nn.ModuleList(
            linear(before, after, bias=False) for before, after in zip(self.widths, self.widths[1:], strict=False)
        )
        self.output = linear(self.widths[-1], shape.width, bias=False)
        if config.start == "identity":
            nn.init.zeros_(self.output.weight)
            self.bound = 2.0  # type: ignore[misc]

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return the mask, (B or 1, D)."""
        p, *q = self.inputs(x if context is None else context).split([self.widths[0], *self.widths], dim=-1)
        p = q[0] * p / self.config.alpha
        for step, factor in zip(self.steps, q[1:], strict=True):
            p = factor * step(p) / self.config.alpha
        mask = torch.sigmoid(self.output(p))
        return mask if self.bound == 1.0 else mask * self.bound
