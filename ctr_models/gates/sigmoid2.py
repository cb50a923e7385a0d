"""FinalMLP's context-aware feature gate."""

from __future__ import annotations

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from ctr_models.errors import ConfigError
from ctr_models.gates.base import Gate, GateShape, register_gate
from ctr_models.gates.context import INNER, ContextConfig
from ctr_models.layers.mlp import Activation, layer_activation, linear
from kernels import feature_gate


class Sigmoid2Config(ContextConfig):
    """Settings of gate ``sigmoid2``."""

    context: str | tuple[str, ...] = Field("learned", min_length=1)
    hidden: tuple[PositiveInt, ...] = (64,)
    """Hidden layers of the gate's perceptron; none makes it one Linear."""
    activation: Activation = "relu"
    learned_size: int = Field(16, ge=1)
    """Length of the learned vector of ``context: learned``."""


@register_gate("sigmoid2")
class Sigmoid2Gate(Gate):
    """mask = 2 sigmoid(MLP(context)): damps or amplifies, and is 1 where the MLP says 0.

    In slot ``feature`` one value a coordinate, in slot ``field`` one a field. With ``context: learned`` the mask
    is the same for every row and computed once a batch. The learned vector starts at random: the official code
    starts it at zero under zero biases, where ReLU passes no gradient and only the last bias ever learns.

    Args:
        config: see :class:`Sigmoid2Config`.
        shape: a ``context`` above 0 means that the model supplies it.

    Example:
        >>> from ctr_models.gates import GateShape, GateSpec
        >>> gate = GateSpec.parse({"name": "sigmoid2", "hidden": [8]}).build(GateShape(slot="feature", width=4))
        >>> gate(torch.ones(3, 4)).shape
        torch.Size([1, 4])

    Source: FinalMLP, arXiv 2304.00902.
    """

    slots = frozenset({"feature", "field"})
    Config = Sigmoid2Config
    config: Sigmoid2Config
    bound = 2.0
    source = "arXiv 2304.00902"

    def __init__(self, config: Sigmoid2Config, shape: GateShape) -> None:
        super().__init__(config, shape)
        inputs = shape.context
        self.learned: nn.Parameter | None = None
        if not inputs:
            if config.context == "learned":
                inputs = config.learned_size
                self.learned = nn.Parameter(torch.randn(1, inputs))
            elif config.context == "self":
                inputs = shape.width * (shape.fields if shape.slot == "field" else 1)
            else:
                raise ConfigError(
                    f"context {config.context!r} has to be supplied by the model, which gives none here",
                    where=f"model.gates.{shape.slot}",
                    remedy=f"use one of {list(INNER)}",
                )
        layers: list[nn.Module] = []
        for size in config.hidden:
            layers += [linear(inputs, size), layer_activation(config.activation, size)]
            inputs = size
        last = linear(inputs, shape.fields if shape.slot == "field" else shape.width)
        if config.start == "identity":
            nn.init.zeros_(last.weight)
        self.mlp = nn.Sequential(*layers, last)

    @property
    def by_context(self) -> bool:
        """Whether the context is supplied or learned, and not the gated vector itself."""
        return self.shape.context > 0 or self.learned is not None

    def hidden(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return what the perceptron's last product is taken of, (B or 1, H)."""
        if context is None:
            context = self.learned if self.learned is not None else x.flatten(1)
        *layers, _ = self.mlp
        for layer in layers:
            context = layer(context)
        return context

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return the mask: (B or 1, D) in slot feature, (B or 1, F, 1) in slot field."""
        mask = 2 * torch.sigmoid(self.mlp[-1](self.hidden(x, context)))
        return mask.unsqueeze(2) if self.shape.slot == "field" else mask

    def gated(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return ``x`` times the mask."""
        last = self.mlp[-1]
        return feature_gate(x, self.hidden(x, context), last.weight, last.bias, fused=self.fused)
