"""FinalMLP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from ctr_models.batch import Batch
from ctr_models.candidates import Candidates, takes_candidates
from ctr_models.gates.base import GateShape, GateSpec
from ctr_models.layers.fusion import BilinearFusion
from ctr_models.layers.gated_embedding import GatedEmbedding
from ctr_models.layers.mlp import MLP, MLPConfig
from ctr_models.model import CTRModel, ModelConfig, register_model
from ctr_models.schema import Schema


class FinalMLPConfig(ModelConfig):
    """Settings of ``finalmlp``."""

    mlp1: MLPConfig = MLPConfig(hidden=(400,), dropout=0.2, batch_norm=True)
    mlp2: MLPConfig = MLPConfig(hidden=(400,), dropout=0.2, batch_norm=True)
    heads: int = Field(10, ge=1)
    """Heads of the bilinear fusion, a divisor of both streams' last layers."""


@register_model("finalmlp")
class FinalMLP(CTRModel):
    """Two gated streams, fused by products: logit = BilinearFusion(MLP_1(h_1), MLP_2(h_2)), h_s = gate_s(e).

    Slot ``feature`` holds one gate a stream; the published contexts are a list, ``context: [user, item]``. Slot
    ``fusion`` gates each stream's output by the other's. Without gates this is DualMLP with bilinear fusion.

    Differences from the official code: the learned context starts at random, not at zero (where it can't learn),
    and the fusion's bias stands once, not twice.

    Example:
        >>> from ctr_models import create_model, example_batch
        >>> schema = Schema.of({"user": 10, "item": 20}, roles={"user": "user", "item": "item"})
        >>> gate = {"name": "sigmoid2", "context": ["user", "item"], "hidden": [8]}
        >>> create_model("finalmlp", schema, gates={"feature": gate})(example_batch(schema, rows=3)).shape
        torch.Size([3])

    Source: arXiv 2304.00902.
    """

    Config = FinalMLPConfig
    default_gates: ClassVar[Mapping[str, str]] = {"field": "none", "feature": "sigmoid2", "fusion": "none"}
    source = "arXiv 2304.00902"

    def __init__(self, config: FinalMLPConfig, schema: Schema, gates: Mapping[str, GateSpec]) -> None:
        super().__init__(config, schema, gates)
        self.inputs = GatedEmbedding(schema, gates, std=config.embedding_std, streams=2)
        self.mlp1 = MLP(self.inputs.width, config.mlp1)
        self.mlp2 = MLP(self.inputs.width, config.mlp2)
        d1, d2 = self.mlp1.width, self.mlp2.width
        self.fusion = BilinearFusion(d1, d2, heads=config.heads)
        self.fusion_gate1 = gates["fusion"].build(GateShape(slot="fusion", width=d1, context=d2))
        self.fusion_gate2 = gates["fusion"].build(GateShape(slot="fusion", width=d2, context=d1))

    @takes_candidates
    def forward(self, batch: Batch | Candidates) -> Tensor:
        """Return logits, (B,)."""
        x1, x2 = self.inputs(batch)  # (B, D) each
        o1, o2 = self.mlp1(x1), self.mlp2(x2)  # (B, d1), (B, d2)
        return self.fusion(self.fusion_gate1.gated(o1, o2), self.fusion_gate2.gated(o2, o1))
