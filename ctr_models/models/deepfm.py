"""DeepFM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from ctr_models.batch import Batch
from ctr_models.errors import ConfigError
from ctr_models.gates.base import GateSpec
from ctr_models.layers.gated_embedding import GatedEmbedding
from ctr_models.layers.linear_term import LinearTerm
from ctr_models.layers.mlp import MLP, MLPConfig
from ctr_models.model import CTRModel, ModelConfig, register_model
from ctr_models.schema import Schema


class DeepFMConfig(ModelConfig):
    """Settings of ``deepfm``."""

    mlp: MLPConfig = MLPConfig()


@register_model("deepfm")
class DeepFM(CTRModel):
    """logit = linear term + sum over pairs of fields <e_i, e_j> + MLP(e), on one set of embeddings.

    Both the pairs and the MLP see the gated embeddings.

    Raises:
        ConfigError: fields differ in dimension.

    Example:
        >>> from ctr_models import create_model, example_batch
        >>> schema = Schema.of({"user": 10, "item": 20})
        >>> create_model("deepfm", schema)(example_batch(schema, rows=3)).shape
        torch.Size([3])

    Source: arXiv 1703.04247.
    """

    Config = DeepFMConfig
    default_gates: ClassVar[Mapping[str, str]] = {"field": "none", "feature": "none"}
    source = "arXiv 1703.04247"

    def __init__(self, config: DeepFMConfig, schema: Schema, gates: Mapping[str, GateSpec]) -> None:
        super().__init__(config, schema, gates)
        if len({f.dim for f in schema.fields}) > 1:
            dims = {f.name: f.dim for f in schema.fields}
            raise ConfigError(
                f"deepfm needs fields of one dimension, found {dims}",
                where="model",
                remedy="give every feature the same dim",
            )
        self.linear = LinearTerm(schema, std=config.embedding_std)
        self.inputs = GatedEmbedding(schema, gates, std=config.embedding_std)
        self.mlp = MLP(self.inputs.width, config.mlp, outputs=1)

    def forward(self, batch: Batch) -> Tensor:
        """Return logits, (B,)."""
        (x,) = self.inputs(batch)  # (B, D)
        return self.linear(batch) + pairwise(x.view(len(x), self.inputs.fields, -1)) + self.mlp(x).squeeze(1)


def pairwise(e: Tensor) -> Tensor:
    """Return the sum of <e_i, e_j> over pairs i < j as half of (|sum e|^2 - sum |e|^2).

    Args:
        e: (B, F, d).

    Returns:
        (B,).

    Example:
        >>> import torch
        >>> pairwise(torch.tensor([[[1.0], [2.0], [3.0]]]))  # 1*2 + 1*3 + 2*3
        tensor([11.])
    """
    return 0.5 * (e.sum(1).square().sum(1) - e.square().sum((1, 2)))
