"""The plain deep network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from ctr_models.batch import Batch
from ctr_models.gates.base import GateSpec
from ctr_models.layers.gated_embedding import GatedEmbedding
from ctr_models.layers.mlp import MLP, MLPConfig
from ctr_models.model import CTRModel, ModelConfig, register_model
from ctr_models.schema import Schema


class DNNConfig(ModelConfig):
    """Settings of ``dnn``."""

    mlp: MLPConfig = MLPConfig()


@register_model("dnn")
class DNN(CTRModel):
    """logit = MLP(e) over the concatenated embeddings.

    Example:
        >>> from ctr_models import create_model, example_batch
        >>> schema = Schema.of({"user": 10, "item": 20})
        >>> create_model("dnn", schema, mlp={"hidden": [8]})(example_batch(schema, rows=3)).shape
        torch.Size([3])
    """

    Config = DNNConfig
    default_gates: ClassVar[Mapping[str, str]] = {"field": "none", "feature": "none"}

    def __init__(self, config: DNNConfig, schema: Schema, gates: Mapping[str, GateSpec]) -> None:
        super().__init__(config, schema, gates)
        self.inputs = GatedEmbedding(schema, gates, std=config.embedding_std)
        self.mlp = MLP(self.inputs.width, config.mlp, outputs=1)

    def forward(self, batch: Batch) -> Tensor:
        """Return logits, (B,)."""
        (x,) = self.inputs(batch)  # (B, D)
        return self.mlp(x).squeeze(1)
