"""DeepFM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from ctr_models.batch import Batch
from ctr_models.candidates import Candidates, takes_candidates
from ctr_models.gates.base import GateSpec
from ctr_models.layers.gated_embedding import GatedEmbedding
from ctr_models.layers.linear_term import LinearTerm
from ctr_models.layers.mlp import MLP, MLPConfig
from ctr_models.layers.products import pairwise
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
        self.dim = schema.common_dim(self.name)
        self.linear = LinearTerm(schema, std=config.embedding_std)
        self.inputs = GatedEmbedding(schema, gates, std=config.embedding_std)
        self.mlp = MLP(self.inputs.width, config.mlp, outputs=1)

    @takes_candidates
    def forward(self, batch: Batch | Candidates) -> Tensor:
        """Return logits, (B,)."""
        (x,) = self.inputs(batch)  # (B, D)
        return self.linear(batch) + pairwise(x, self.dim) + self.mlp(x).squeeze(1)
