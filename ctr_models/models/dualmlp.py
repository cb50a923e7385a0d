"""DualMLP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from ctr_models.batch import Batch
from ctr_models.candidates import Candidates, takes_candidates
from ctr_models.gates.base import GateSpec
from ctr_models.layers.gated_embedding import GatedEmbedding
from ctr_models.layers.mlp import MLP, MLPConfig
from ctr_models.model import CTRModel, ModelConfig, register_model
from ctr_models.schema import Schema


class DualMLPConfig(ModelConfig):
    """Settings of ``dualmlp``."""

    mlp1: MLPConfig = MLPConfig(hidden=(400, 400, 400), dropout=0.2, batch_norm=True)
    mlp2: MLPConfig = MLPConfig(hidden=(400,), dropout=0.2, batch_norm=True)


@register_model("dualmlp")
class DualMLP(CTRModel):
    """logit = MLP_1(e) + MLP_2(e). FinalMLP adds a gate before each stream and products between them.

    Example:
        >>> from ctr_models import create_model, example_batch
        >>> schema = Schema.of({"user": 10, "item": 20})
        >>> create_model("dualmlp", schema)(example_batch(schema, rows=3)).shape
        torch.Size([3])

    Source: arXiv 2304.00902.
    """

    Config = DualMLPConfig
    default_gates: ClassVar[Mapping[str, str]] = {"field": "none", "feature": "none"}
    source = "arXiv 2304.00902"

    def __init__(self, config: DualMLPConfig, schema: Schema, gates: Mapping[str, GateSpec]) -> None:
        super().__init__(config, schema, gates)
        self.inputs = GatedEmbedding(schema, gates, std=config.embedding_std, streams=2)
        self.mlp1 = MLP(self.inputs.width, config.mlp1, outputs=1)
        self.mlp2 = MLP(self.inputs.width, config.mlp2, outputs=1)

    @takes_candidates
    def forward(self, batch: Batch | Candidates) -> Tensor:
        """Return logits, (B,)."""
        x1, x2 = self.inputs(batch)  # (B, D) each
        return (self.mlp1(x1) + self.mlp2(x2)).squeeze(1)
