"""The sparse gate of a mixture: k choices share, the others get nothing."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ctr_models.errors import ConfigError
from ctr_models.gates.base import GateShape, register_gate
from ctr_models.gates.softmax import SoftmaxConfig, SoftmaxGate


class TopKConfig(SoftmaxConfig):
    """Settings of gate ``topk``."""

    start: Literal["paper"] = "paper"
    """A gate that leaves experts out can't begin as the control, which leaves none out."""
    k: int = Field(2, ge=2)
    """Experts that get a weight. A single one would get 1 whatever its logit, and the gate would never learn."""


@register_gate("topk")
class TopKGate(SoftmaxGate):
    """weights = softmax over the k largest of act(W x + b) / temperature, exactly 0 elsewhere.

    Args:
        config: see :class:`TopKConfig`.
        shape: ``choices`` is K.

    Raises:
        ConfigError: k is above K.

    Example:
        >>> from ctr_models.gates import GateShape, GateSpec
        >>> gate = GateSpec(name="topk").build(GateShape(slot="expert", width=3, choices=4))
        >>> (gate(torch.randn(5, 3)) > 0).sum(1)
        tensor([2, 2, 2, 2, 2])

    Source: arXiv 1701.06538; as estimator: arXiv 2309.13850.
    """

    slots = frozenset({"expert"})
    Config = TopKConfig
    config: TopKConfig
    source = "arXiv 2309.13850"

    def __init__(self, config: TopKConfig, shape: GateShape) -> None:
        super().__init__(config, shape)
        if config.k > shape.choices:
            raise ConfigError(
                f"{config.k} of {shape.choices} experts can't be kept",
                where=f"model.gates.{shape.slot}: k",
                remedy=f"at most {shape.choices}, or raise the number of experts",
            )

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return the weights, (B, K), k of them above 0."""
        return keep_largest(self.logits(x), self.config.k)


def keep_largest(logits: Tensor, k: int) -> Tensor:
    """Return the softmax over the k largest of each row, and 0 for the others.

    Example:
        >>> keep_largest(torch.tensor([[1.0, 5.0, 1.0 + 1.0986, 0.0]]), 2).round(decimals=2)
        tensor([[0.0000, 0.9500, 0.0500, 0.0000]])
    """
    largest, places = logits.topk(k, dim=-1)
    shares = largest.softmax(-1)
    return torch.zeros_like(logits, dtype=shares.dtype).scatter(-1, places, shares)
