"""MaskNet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from ctr_models.batch import Batch
from ctr_models.gates.base import GateSpec
from ctr_models.layers.gated_embedding import GatedEmbedding
from ctr_models.layers.mlp import MLP, MLPConfig, linear
from ctr_models.model import CTRModel, ModelConfig, register_model
from ctr_models.schema import Schema


class MaskNetConfig(ModelConfig):
    """Settings of ``masknet``."""

    form: Literal["parallel", "serial"] = "parallel"
    """``parallel``: every block masks the embeddings, an MLP reads them side by side. ``serial``: each block
    masks the output of the one before, the last one is read by a Linear."""
    blocks: tuple[PositiveInt, ...] = Field((64, 64, 64), min_length=1)
    """Output of each block."""
    ratio: float = Field(2.0, gt=0)
    """Hidden units of a mask's perceptron for each value that it masks."""
    field_norm: bool = True
    """Normalise each field's vector before it is masked; fields then need one dimension."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """After each block."""
    mlp: MLPConfig = MLPConfig()
    """On the blocks of the parallel form."""


@register_model("masknet")
class MaskNet(CTRModel):
    """Blocks that multiply what they see by a mask computed from the row's embeddings e.

    block(e, h) = relu(norm(W (mask(e) * h))), mask(e) = W2 relu(W1 e + b1) + b2, a mask without bounds. With h_0
    the embeddings, normalised a field: parallel: logit = MLP([block_k(e, h_0) for all k]); serial:
    h_k = block_k(e, h_{k-1}), logit = w . h_K + b.

    A gate in slot ``feature`` with ``context: self`` is such a mask with bounds, before the first block.

    Raises:
        ConfigError: fields differ in dimension and are to be normalised.

    Example:
        >>> from ctr_models import create_model, example_batch
        >>> schema = Schema.of({"user": 10, "item": 20})
        >>> create_model("masknet", schema, form="serial")(example_batch(schema, rows=3)).shape
        torch.Size([3])

    Source: arXiv 2102.07619.
    """

    Config = MaskNetConfig
    config: MaskNetConfig
    default_gates: ClassVar[Mapping[str, str]] = {"field": "none", "feature": "none"}
    source = "arXiv 2102.07619"

    def __init__(self, config: MaskNetConfig, schema: Schema, gates: Mapping[str, GateSpec]) -> None:
        super().__init__(config, schema, gates)
        self.inputs = GatedEmbedding(schema, gates, std=config.embedding_std)
        self.norm: FieldNorm | None = None
        if config.field_norm:
            self.norm = FieldNorm(self.inputs.fields, schema.common_dim(self.name))
        width, serial = self.inputs.width, config.form == "serial"
        seen = [width, *config.blocks[:-1]] if serial else [width] * len(config.blocks)
        self.blocks = nn.ModuleList(
            MaskBlock(width, hidden, size, ratio=config.ratio, dropout=config.dropout)
            for hidden, size in zip(seen, config.blocks, strict=True)
        )
        self.head = linear(config.blocks[-1], 1) if serial else MLP(sum(config.blocks), config.mlp, outputs=1)

    def forward(self, batch: Batch) -> Tensor:
        """Return logits, (B,)."""
        (e,) = self.inputs(batch)  # (B, D)
        h = e if self.norm is None else self.norm(e)
        if self.config.form == "serial":
            for block in self.blocks:
                h = block(e, h)
        else:
            h = torch.cat([block(e, h) for block in self.blocks], dim=1)
        return self.head(h).squeeze(1)


class MaskBlock(nn.Module):
    """relu(norm(W (mask(e) * h))): a layer whose input is multiplied by a mask.

    Args:
        width: of e, from which the mask is computed.
        hidden: of h, which is masked.
        outputs: of the block.
        ratio: units of the mask's hidden layer for each value of h.
        dropout: after the ReLU.

    Example:
        >>> MaskBlock(4, 3, 2, ratio=2)(torch.zeros(5, 4), torch.zeros(5, 3)).shape
        torch.Size([5, 2])
    """

    def __init__(self, width: int, hidden: int, outputs: int, *, ratio: float, dropout: float = 0.0) -> None:
        super().__init__()
        units = max(1, int(hidden * ratio))
        self.mask = nn.Sequential(linear(width, units), nn.ReLU(inplace=True), linear(units, hidden))
        self.layer = nn.Sequential(
            linear(hidden, outputs, bias=False),
            nn.LayerNorm(outputs),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
        )

    def forward(self, e: Tensor, h: Tensor) -> Tensor:
        """Map (B, width) and (B, hidden) to (B, outputs)."""
        return self.layer(self.mask(e) * h)


class FieldNorm(nn.Module):
    """Layer normalisation of each field's vector, with its own scale and shift.

    Args:
        fields: F.
        dim: d.

    Example:
        >>> FieldNorm(2, 2)(torch.tensor([[1.0, 3.0, 10.0, 30.0]])).round(decimals=3)
        tensor([[-1.,  1., -1.,  1.]], grad_fn=<RoundBackward1>)
    """

    def __init__(self, fields: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(fields, dim))
        self.bias = nn.Parameter(torch.zeros(fields, dim))

    def forward(self, e: Tensor) -> Tensor:
        """Map (B, F d) to (B, F d)."""
        fields = e.unflatten(1, self.weight.shape)  # (B, F, d)
        return (F.layer_norm(fields, fields.shape[2:]) * self.weight + self.bias).flatten(1)
