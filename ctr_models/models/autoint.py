"""AutoInt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field
from torch import Tensor, nn

from ctr_models.batch import Batch
from ctr_models.gates.base import GateSpec
from ctr_models.layers.attention import SelfAttention
from ctr_models.layers.gated_embedding import GatedEmbedding
from ctr_models.layers.linear_term import LinearTerm
from ctr_models.layers.mlp import MLP, MLPConfig, linear
from ctr_models.model import CTRModel, ModelConfig, register_model
from ctr_models.schema import Schema


class AutoIntConfig(ModelConfig):
    """Settings of ``autoint``."""

    attention_layers: int = Field(3, ge=1)
    heads: int = Field(2, ge=1)
    """Attention heads, a divisor of ``width``."""
    width: int = Field(64, ge=1)
    """Of a layer's output for each field, all heads together."""
    residual: bool = True
    scale: bool = False
    """Divide the scores by the root of a head's width."""
    layer_norm: bool = False
    """Normalise each layer before its ReLU."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Of the attention weights."""
    linear: bool = False
    """Add the linear term."""
    mlp: MLPConfig | None = None
    """AutoInt+: add a perceptron on the embeddings."""


@register_model("autoint")
class AutoInt(CTRModel):
    """Fields attend to fields, layer upon layer; AutoInt+ where ``mlp`` is set.

    x_{l+1} = relu(heads_l(x_l) + R_l x_l), x_0 = e, each field a position, R_l the identity where the widths
    agree; logit = w . [x_L of all fields] + b, + MLP(e) and + the linear term where they are set.

    Differences from the official code: Q, K, V and the residual are linear, where it passes them through ReLU
    with biases; scores are not scaled and layers not normalised unless the settings say so. Each layer has its
    residual; ports with one around the whole stack lose what the paper's ablation finds to matter most.

    Raises:
        ConfigError: fields differ in dimension; heads don't divide the width.

    Example:
        >>> from ctr_models import create_model, example_batch
        >>> schema = Schema.of({"user": 10, "item": 20})
        >>> create_model("autoint", schema, mlp={"hidden": [8]})(example_batch(schema, rows=3)).shape
        torch.Size([3])

    Source: arXiv 1810.11921.
    """

    Config = AutoIntConfig
    default_gates: ClassVar[Mapping[str, str]] = {"field": "none", "feature": "none", "attention": "none"}
    source = "arXiv 1810.11921"

    def __init__(self, config: AutoIntConfig, schema: Schema, gates: Mapping[str, GateSpec]) -> None:
        super().__init__(config, schema, gates)
        width = schema.common_dim(self.name)
        self.inputs = GatedEmbedding(schema, gates, std=config.embedding_std)
        self.layers = nn.ModuleList()
        for depth in range(config.attention_layers):
            self.layers.append(InteractingLayer(width, config, gate=gates["attention"], depth=depth))
            width = config.width
        self.head = linear(self.inputs.fields * width, 1)
        self.linear = LinearTerm(schema, std=config.embedding_std) if config.linear else None
        self.mlp = MLP(self.inputs.width, config.mlp, outputs=1) if config.mlp is not None else None

    def forward(self, batch: Batch) -> Tensor:
        """Return logits, (B,)."""
        (flat,) = self.inputs(batch)  # (B, D)
        x = flat.unflatten(1, (self.inputs.fields, -1))  # (B, F, d)
        for layer in self.layers:
            x = layer(x)  # (B, F, width)
        logits = self.head(x.flatten(1)).squeeze(1)
        if self.mlp is not None:
            logits = logits + self.mlp(flat).squeeze(1)
        if self.linear is not None:
            logits = logits + self.linear(batch)
        return logits


class InteractingLayer(nn.Module):
    """relu(norm(heads(x) + R x)), R the identity where input and output agree in width.

    Args:
        inputs: width of a field's vector.
        config: the model's settings.
        gate: of slot ``attention``.
        depth: which layer, counted from 0.
    """

    def __init__(self, inputs: int, config: AutoIntConfig, *, gate: GateSpec, depth: int) -> None:
        super().__init__()
        self.attention = SelfAttention(
            inputs,
            config.width,
            heads=config.heads,
            gate=gate,
            scale=config.scale,
            dropout=config.dropout,
            depth=depth,
        )
        self.residual: nn.Module | None = None
        if config.residual:
            same = inputs == config.width
            self.residual = nn.Identity() if same else linear(inputs, config.width, bias=False)
        self.norm = nn.LayerNorm(config.width) if config.layer_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, F, inputs) to (B, F, width)."""
        attended = self.attention(x)
        if self.residual is not None:
            attended = attended + self.residual(x)
        return self.norm(attended).relu()
