"""DIN's local activation: how much each behaviour of a history concerns the candidate."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt
from torch import Tensor, nn

from ctr_models.jagged import rows_of, segment_softmax
from ctr_models.layers.dice import Dice
from ctr_models.layers.mlp import LayerActivation, layer_activation, linear
from kernels.activated_linear import KINDS, activated_linear
from kernels.target_layer import target_layer


class TargetAttentionConfig(BaseModel):
    """The perceptron that compares a behaviour with the candidate."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    hidden: tuple[PositiveInt, ...] = Field((80, 40), min_length=1)
    activation: LayerActivation = "dice"
    dropout: float = Field(0.0, ge=0, lt=1)
    softmax: bool = False
    """Whether the scores of a history sum to 1. False, as published, keeps the intensity of an interest."""


class TargetAttention(nn.Module):
    """score_j = MLP([q, k_j, q - k_j, q * k_j]) for each behaviour k_j of a row with candidate q.

    Histories are jagged: nothing is padded, and no batch statistic sees anything but behaviours. The input of the
    first layer is never laid out either (see :func:`kernels.target_layer.target_layer`).

    Args:
        width: d, of behaviours and candidate.
        config: the perceptron.

    Example:
        >>> attention = TargetAttention(4, TargetAttentionConfig(hidden=(8,)))
        >>> offsets = torch.tensor([0, 2, 2, 3])  # histories of two, no and one behaviour
        >>> attention(torch.randn(3, 4), offsets, torch.randn(3, 4)).shape
        torch.Size([3])

    Source: arXiv 1706.06978.
    """

    fused: bool = True
    """Whether fast operators may run; ``model.kernels`` of the model sets it."""

    def __init__(self, width: int, config: TargetAttentionConfig) -> None:
        super().__init__()
        self.softmax = config.softmax
        self.first = linear(4 * width, config.hidden[0])
        # A softmax does not see what is added to all scores alike.
        sizes, biased = (*config.hidden, 1), [True] * (len(config.hidden) - 1) + [not config.softmax]
        self.rest = nn.Sequential(
            *(
                ActivatedLinear(size, after, activation=config.activation, dropout=config.dropout, bias=bias)
                for size, after, bias in zip(sizes[:-1], sizes[1:], biased, strict=True)
            )
        )

    def forward(self, values: Tensor, offsets: Tensor, query: Tensor) -> Tensor:
        """Return the score of each behaviour, (T,), float32 or better.

        Args:
            values: behaviours of all histories, (T, d).
            offsets: where each history begins, and T at the end, (B + 1,).
            query: the candidates, (B, d).
        """
        s = target_layer(values, offsets, query, self.first.weight, self.first.bias, fused=self.fused)  # (T, h)
        scores = self.rest(s).squeeze(1)  # (T,)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        if not self.softmax:
            return scores
        return segment_softmax(scores, rows_of(offsets, values.shape[0]), offsets.shape[0] - 1)


class ActivatedLinear(nn.Module):
    """y = W f(s) + b, where what the activation f returns is not kept but computed anew in the backward.

    Args:
        inputs: width of s.
        outputs: width of y.
        activation: f.
        dropout: of what f returns; f is kept then.
        bias: whether there is a b.

    Example:
        >>> ActivatedLinear(4, 2, activation="dice")(torch.randn(5, 4)).shape
        torch.Size([5, 2])
    """

    fused: bool = True
    """Whether fast operators may run; ``model.kernels`` of the model sets it."""

    def __init__(
        self, inputs: int, outputs: int, *, activation: LayerActivation, dropout: float = 0.0, bias: bool = True
    ) -> None:
        super().__init__()
        self.activation = layer_activation(activation, inputs)
        self.dropout = nn.Dropout(dropout)
        self.linear = linear(inputs, outputs, bias=bias)
        self._kind: Any = activation if activation in KINDS and not dropout else None

    def forward(self, s: Tensor) -> Tensor:
        """Map (N, inputs) to (N, outputs)."""
        if self._kind is None:
            return self.linear(self.dropout(self.activation(s)))
        alpha = mean = rate = None
        if isinstance(self.activation, Dice):
            alpha, (mean, rate) = self.activation.alpha, self.activation.statistics(s)
        return activated_linear(
            s, self.linear.weight, self.linear.bias, activation=self._kind, alpha=alpha, mean=mean, rate=rate,
            fused=self.fused,
        )  # fmt: skip
