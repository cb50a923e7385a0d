"""DIN's local activation: how much each behaviour of a history concerns the candidate."""

from __future__ import annotations

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from ctr_models.jagged import rows_of as rows_of
from ctr_models.jagged import segment_softmax
from ctr_models.layers.mlp import LayerActivation, layer_activation, linear


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
    first layer is never laid out either. With its weights cut into W_q, W_k, W_d, W_p,

        W [q, k, q - k, q * k] = (W_q + W_d) q + (W_k - W_d) k + W_p (q * k),

    where the first term is computed once a row and the others on d numbers a behaviour instead of 4 d.

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

    def __init__(self, width: int, config: TargetAttentionConfig) -> None:
        super().__init__()
        self.softmax = config.softmax
        self.first = linear(4 * width, config.hidden[0])
        layers: list[nn.Module] = []
        for place, size in enumerate(config.hidden):
            if place:
                layers.append(linear(config.hidden[place - 1], size))
            layers.append(layer_activation(config.activation, size))
            if config.dropout:
                layers.append(nn.Dropout(config.dropout))
        # A softmax does not see what is added to all scores alike.
        layers.append(linear(config.hidden[-1], 1, bias=not config.softmax))
        self.rest = nn.Sequential(*layers)

    def forward(self, values: Tensor, offsets: Tensor, query: Tensor) -> Tensor:
        """Return the score of each behaviour, (T,), float32 or better.

        Args:
            values: behaviours of all histories, (T, d).
            offsets: where each history begins, and T at the end, (B + 1,).
            query: the candidates, (B, d).
        """
        rows = rows_of(offsets, values.shape[0])
        of_query, of_key, of_difference, of_product = self.first.weight.chunk(4, dim=1)  # (h, d) each
        asked = F.linear(query, of_query + of_difference, self.first.bias)  # (B, h)
        met = F.linear(values, of_key - of_difference) + F.linear(values * query[rows], of_product)  # (T, h)
        scores = self.rest(met + asked[rows]).squeeze(1)  # (T,)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        return segment_softmax(scores, rows, offsets.shape[0] - 1) if self.softmax else scores
