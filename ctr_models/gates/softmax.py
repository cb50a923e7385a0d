"""The dense gate of a mixture: every choice gets a share."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from ctr_models.errors import ConfigError
from ctr_models.gates.base import Gate, GateConfig, GateShape, register_gate
from ctr_models.layers.mlp import ACTIVATIONS, linear


class SoftmaxConfig(GateConfig):
    """Settings of gate ``softmax``."""

    activation: Literal["none", "gelu", "silu", "tanh", "sigmoid"] = "none"
    """Taken of the linear map before the softmax. ReLU is left out: choices below zero would never learn."""
    temperature: float = Field(1.0, gt=0)
    """Divides the logits: below 1 sharpens the choice, above 1 evens it out."""


@register_gate("softmax")
class SoftmaxGate(Gate):
    """weights = softmax(act(W x + b) / temperature) over the K choices; act is the identity unless set.

    In slot ``interaction`` ``x`` are the logits: weights = softmax(act(x) / temperature). ``start: identity``
    starts W at zero, and every expert with the share 1 / K that gate ``none`` gives it.

    Under a bare temperature the parameters of gate and experts are estimated at a rate slower than any polynomial
    of the number of rows; an activation between linear map and softmax restores polynomial rates.

    Args:
        config: see :class:`SoftmaxConfig`.
        shape: ``choices`` is K.

    Example:
        >>> import torch
        >>> from ctr_models.gates import GateShape, GateSpec
        >>> spec = GateSpec.parse({"name": "softmax", "temperature": 2})
        >>> spec.build(GateShape(slot="interaction", width=2, choices=2))(torch.tensor([[0.0, 2.0]]))
        tensor([[0.2689, 0.7311]])

    Source: MMoE, KDD 2018; activation and temperature: arXiv 2401.13875.
    """

    slots = frozenset({"expert", "interaction"})
    Config = SoftmaxConfig
    config: SoftmaxConfig
    source = "MMoE, KDD 2018"

    def __init__(self, config: SoftmaxConfig, shape: GateShape) -> None:
        super().__init__(config, shape)
        self.linear = linear(shape.width, shape.choices) if shape.slot == "expert" else nn.Identity()
        self.activation = nn.Identity() if config.activation == "none" else ACTIVATIONS[config.activation]()
        if shape.slot == "interaction":
            require_plain_logits(config, config.temperature == 1 and config.activation == "none")
        elif config.start == "identity":
            nn.init.zeros_(self.linear.weight)

    def logits(self, x: Tensor) -> Tensor:
        """Return what the softmax is taken of, (B, K)."""
        return self.activation(self.linear(x)) / self.config.temperature

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return the weights, (B, K)."""
        return self.logits(x).softmax(-1)


def require_plain_logits(config: GateConfig, plain: bool) -> None:
    """Refuse ``start: identity`` in slot interaction where a gate does more to the logits than gate ``none``.

    Raises:
        ConfigError: it is asked for and the logits are not ``plain``.
    """
    if config.start == "identity" and not plain:
        raise ConfigError(
            "with an activation or a temperature, weights are not those of gate none",
            where="model.gates.interaction: start",
            remedy="use start: paper, or leave activation and temperature out",
        )
