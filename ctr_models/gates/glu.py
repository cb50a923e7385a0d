"""Gated linear units as feature gates: one class, a file an activation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

from torch import Tensor, nn

from ctr_models.gates.base import Gate, GateShape
from ctr_models.gates.context import ContextConfig, require_context
from ctr_models.layers.mlp import linear


class GLUConfig(ContextConfig):
    """Settings of gates ``swiglu``, ``geglu`` and ``simple``. ``context: self`` is what is gated."""


class GLUGate(Gate):
    """mask = act(W c + b), one value a coordinate, unbounded; c is the context, or ``x`` if none is given.

    A gated linear unit act(W c + b) * (V x) whose values are x as they are: V falls to the layer behind. b starts
    where act(b) = 1, not at 0: fresh embeddings are close to 0, and their product with a mask close to 0 would
    hardly learn. ``start: identity`` starts W at zero besides.
    """

    slots = frozenset({"feature"})
    Config = GLUConfig
    config: GLUConfig
    bound, floor = math.inf, -math.inf
    activation: ClassVar[Callable[[Tensor], Tensor]]
    one: ClassVar[float]
    """Where the activation is 1."""

    def __init__(self, config: GLUConfig, shape: GateShape) -> None:
        super().__init__(config, shape)
        require_context(config, shape)
        self.linear = linear(shape.context or shape.width, shape.width)
        nn.init.constant_(self.linear.bias, self.one)
        if config.start == "identity":
            nn.init.zeros_(self.linear.weight)

    @property
    def by_context(self) -> bool:
        """Whether the context is supplied, and not the gated vector itself."""
        return self.shape.context > 0

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return the mask, (B or 1, D)."""
        return type(self).activation(self.linear(x if context is None else context))
