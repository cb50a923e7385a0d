"""Causal self-attention over behaviour histories: SASRec, and MQSA's mixture of short and long queries."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from ctr_models.errors import ConfigError
from ctr_models.layers.mlp import linear
from ctr_models.layers.target_attention import rows_of


class _Encoder(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    heads: PositiveInt = 1
    """A divisor of the behaviours' dimension."""
    dropout: float = Field(0.2, ge=0, lt=1)
    """Of the inputs, the attention weights and both layers of a block."""
    length: PositiveInt | None = None
    """How many of a history's last behaviours are looked at; None: as many as the feature keeps."""


class SASRecEncoderConfig(_Encoder):
    """One stack whose queries are single behaviours."""

    name: Literal["sasrec"] = "sasrec"
    blocks: PositiveInt = 2

    @property
    def stacks(self) -> tuple[tuple[int, float], ...]:
        """Query length and weight of each stack."""
        return ((1, 1.0),)


class MQSAEncoderConfig(_Encoder):
    """Two stacks, mixed: queries are single behaviours in one, means of the last few in the other."""

    name: Literal["mqsa"] = "mqsa"
    blocks: PositiveInt = 1
    query: int = Field(3, ge=2)
    """Behaviours of which a long query is the mean."""
    alpha: float = Field(0.5, gt=0, lt=1)
    """Weight of the short queries' stack; the long queries' has 1 - alpha."""

    @property
    def stacks(self) -> tuple[tuple[int, float], ...]:
        """Query length and weight of each stack."""
        return ((1, self.alpha), (self.query, 1 - self.alpha))


EncoderConfig = Annotated[SASRecEncoderConfig | MQSAEncoderConfig, Field(discriminator="name")]


class SequenceEncoder(nn.Module):
    """Encodes each behaviour of a history together with those before it.

        h_t = dropout(sqrt(d) e_t + p_age(t))
        q_t = LN(mean of h_(t-L+1) ... h_t)         as many of them as there are
        a_t = q_t + softmax_(s <= t)(<W_Q q_t, W_K h_s> / sqrt(d_h)) W_V h_s
        z_t = LN(a_t) + FFN(LN(a_t)),  FFN(x) = W_2 relu(W_1 x)

    This is a block; the next takes z for h, and after the last there is a LayerNorm. ``sasrec`` is one stack with
    L = 1. ``mqsa`` has two with weights of their own, L = 1 and L = ``query``, on the same h:
    alpha * short + (1 - alpha) * long. Positions are counted from the end: age 0 is the latest behaviour.

    Histories are jagged. Inside they stand side by side, filled up at the end to the longest of the batch: a
    causal query never sees what comes after it, so that nothing filled up takes part in any result. Behaviours
    older than the last ``length`` are not looked at, and come out as zeros.

    Args:
        width: d, of the behaviours.
        config: kind and sizes.
        max_length: of the histories, where the config sets no ``length``.
        std: standard deviation of the initial positions.

    Raises:
        ConfigError: the heads don't divide the width.

    Example:
        >>> encoder = SequenceEncoder(4, MQSAEncoderConfig(), max_length=10)
        >>> values, offsets = torch.randn(3, 4), torch.tensor([0, 2, 2, 3])  # two, no and one behaviour
        >>> encoder(values, offsets).shape, encoder.last(values, offsets).shape
        (torch.Size([3, 4]), torch.Size([3, 4]))

    Source: SASRec, arXiv 1808.09781; MQSA-TED, arXiv 2311.01056.
    """

    def __init__(
        self, width: int, config: SASRecEncoderConfig | MQSAEncoderConfig, *, max_length: int, std: float = 0.02
    ) -> None:
        super().__init__()
        if width % config.heads:
            valid = [h for h in range(1, width + 1) if width % h == 0]
            raise ConfigError(
                f"{config.heads} heads don't divide a dimension of {width}",
                where="model.encoder.heads",
                remedy=f"one of {valid}",
            )
        self.scale, self.dropout = width**0.5, config.dropout
        self.length = min(config.length or max_length, max_length)
        self.positions = nn.Parameter(torch.empty(self.length, width).normal_(std=std))  # (L, d)
        self.weights = [weight for _, weight in config.stacks]
        self.stacks = nn.ModuleList(
            nn.Sequential(
                *(AttentionBlock(width, config.heads, config.dropout, query) for _ in range(config.blocks)),
                nn.LayerNorm(width),
            )
            for query, _ in config.stacks
        )

    def forward(self, values: Tensor, offsets: Tensor) -> Tensor:
        """Return the encoding of every behaviour, (T, d).

        Args:
            values: behaviours of all histories, oldest first, (T, d).
            offsets: where each history begins, and T at the end, (B + 1,).
        """
        begins, lengths = self._window(offsets)
        encoded = self._encode(values, begins, lengths)  # (B, L, d)
        rows = rows_of(offsets, values.shape[0]).long()
        place = torch.arange(values.shape[0], device=values.device) - begins[rows]  # (T,)
        found = encoded.flatten(0, 1)[rows * encoded.shape[1] + place.clamp_min(0)]
        return found * (place >= 0).unsqueeze(1)

    def last(self, values: Tensor, offsets: Tensor) -> Tensor:
        """Return the encoding of each history's latest behaviour, (B, d); zeros for an empty history."""
        begins, lengths = self._window(offsets)
        encoded = self._encode(values, begins, lengths)  # (B, L, d)
        at = (lengths - 1).clamp_min(0).view(-1, 1, 1).expand(-1, 1, encoded.shape[2])
        return encoded.gather(1, at).squeeze(1) * (lengths > 0).unsqueeze(1)

    def _window(self, offsets: Tensor) -> tuple[Tensor, Tensor]:
        """Return where the part of each history that is looked at begins, and how long it is, (B,) each."""
        ends = offsets[1:].long()
        begins = torch.maximum(offsets[:-1].long(), ends - self.length)
        return begins, ends - begins

    def _encode(self, values: Tensor, begins: Tensor, lengths: Tensor) -> Tensor:
        # A program that is traced can't hang on the longest history of the batch.
        traced = torch.compiler.is_compiling()
        longest = self.length if traced or not len(lengths) else max(1, int(lengths.max()))
        place = torch.arange(longest, device=values.device)
        there = place < lengths.unsqueeze(1)  # (B, L)
        filled = torch.cat([values, values.new_zeros(1, values.shape[1])])
        x = filled[torch.where(there, begins.unsqueeze(1) + place, values.shape[0])]  # (B, L, d)
        age = (lengths.unsqueeze(1) - 1 - place).clamp_min(0)
        x = F.dropout(self.scale * x + self.positions[age], self.dropout, self.training)
        outputs = [weight * stack(x) for weight, stack in zip(self.weights, self.stacks, strict=True)]
        return torch.stack(outputs).sum(0) if len(outputs) > 1 else outputs[0]


class AttentionBlock(nn.Module):
    """One block of :class:`SequenceEncoder`.

    Args:
        width: d.
        heads: a divisor of d.
        dropout: of the attention weights and both layers of the perceptron.
        query: L, behaviours of which a query is the mean.
    """

    def __init__(self, width: int, heads: int, dropout: float, query: int) -> None:
        super().__init__()
        self.heads, self.dropout, self.length = heads, dropout, query
        self.query_norm, self.norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (linear(width, width, bias=False) for _ in range(3))
        self.feed = nn.Sequential(
            linear(width, width), nn.ReLU(), nn.Dropout(dropout), linear(width, width), nn.Dropout(dropout)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, L, d) to (B, L, d), each position by itself and those before it."""
        asked = self.query_norm(moving_mean(x, self.length))
        query, key, value = (
            project(source).unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, H, L, d / H)
            for project, source in ((self.query, asked), (self.key, x), (self.value, x))
        )
        dropout = self.dropout if self.training else 0.0
        heads = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)
        x = self.norm(asked + heads.transpose(1, 2).flatten(2))
        return x + self.feed(x)


def moving_mean(x: Tensor, length: int) -> Tensor:
    """Return the mean of each position and the ``length`` - 1 before it, of fewer at the start.

    Args:
        x: (B, L, d).
        length: how many.

    Example:
        >>> moving_mean(torch.tensor([[[2.0], [4.0], [8.0]]]), 2).flatten()
        tensor([2., 3., 6.])
    """
    if length == 1:
        return x
    total = x
    for back in range(1, length):
        total = total + F.pad(x, (0, 0, back, 0))[:, : x.shape[1]]
    count = torch.arange(1, x.shape[1] + 1, device=x.device).clamp_max(length)
    return total / count.unsqueeze(1)
