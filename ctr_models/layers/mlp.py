"""The multi-layer perceptron of every model and gate."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt
from torch import Tensor, nn

from ctr_models.layers.dice import Dice
from ctr_models.shared_rows import Rows, SharedRows

Activation = Literal["relu", "gelu", "silu", "tanh", "sigmoid"]
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}
LayerActivation = Activation | Literal["dice"]
"""Activations of a whole layer: Dice has a parameter and statistics for each unit."""


class MLPConfig(BaseModel):
    """Hidden layers of a perceptron."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    hidden: tuple[PositiveInt, ...] = Field((400, 400, 400), min_length=1)
    activation: LayerActivation = "relu"
    dropout: float = Field(0.0, ge=0, lt=1)
    batch_norm: bool = False


class MLP(nn.Sequential):
    """Layers of Linear, batch normalisation, activation, dropout; then a Linear if ``outputs`` is given.

    Weights start Xavier-normal, biases at zero, as in the published settings of the CTR field.

    Args:
        inputs: width of the input.
        config: the hidden layers.
        outputs: width of a last, plain Linear; None ends with the last hidden layer.

    Example:
        >>> import torch
        >>> MLP(8, MLPConfig(hidden=(16, 4)), outputs=1)(torch.zeros(2, 8)).shape
        torch.Size([2, 1])
    """

    fused: bool = True
    """Whether fast operators may run; ``model.kernels`` of the model sets it."""

    def __init__(self, inputs: int, config: MLPConfig, *, outputs: int | None = None) -> None:
        layers: list[nn.Module] = []
        width = inputs
        for size in config.hidden:
            layers.append(linear(width, size))
            if config.batch_norm:
                layers.append(nn.BatchNorm1d(size))
            layers.append(layer_activation(config.activation, size))
            if config.dropout:
                layers.append(nn.Dropout(config.dropout))
            width = size
        if outputs is not None:
            layers.append(linear(width, outputs))
        super().__init__(*layers)
        self.width = width if outputs is None else outputs

    def forward(self, x: Rows) -> Tensor:
        """Map (B, inputs) to (B, width); of candidates, the first layer computes what is shared once a user."""
        if not isinstance(x, SharedRows):
            return super().forward(x)
        first, *rest = self
        y = x.linear(first, fused=self.fused)
        for layer in rest:
            y = layer(y)
        return y


def layer_activation(name: LayerActivation, size: int) -> nn.Module:
    """Return the activation that follows a layer of ``size`` units."""
    if name == "dice":
        return Dice(size)
    # In place saves a copy of every hidden layer: Linear and BatchNorm don't need their output again.
    return nn.ReLU(inplace=True) if name == "relu" else ACTIVATIONS[name]()


def linear(inputs: int, outputs: int, *, bias: bool = True) -> nn.Linear:
    """Return a Linear with Xavier-normal weights and zero bias."""
    layer = nn.Linear(inputs, outputs, bias=bias)
    nn.init.xavier_normal_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer
