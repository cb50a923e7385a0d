"""GDCN, the gated deep cross network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from ctr_models.batch import Batch
from ctr_models.candidates import Candidates, takes_candidates
from ctr_models.gates.base import GateSpec
from ctr_models.layers.cross import CrossNetwork
from ctr_models.layers.gated_embedding import GatedEmbedding
from ctr_models.layers.mlp import MLP, MLPConfig, linear
from ctr_models.model import CTRModel, ModelConfig, register_model
from ctr_models.schema import Schema


class GDCNConfig(ModelConfig):
    """Settings of ``gdcn``, ``dcnv2`` and ``dcn``."""

    form: Literal["parallel", "stacked", "cross_only"] = "parallel"
    """``parallel``: GDCN-P, the cross network beside the MLP. ``stacked``: GDCN-S, the MLP upon the cross
    network. ``cross_only``: GCN, no MLP."""
    cross_layers: int = Field(3, ge=1)
    mlp: MLPConfig = MLPConfig()


@register_model("gdcn")
class GDCN(CTRModel):
    """Explicit feature crosses, each passed by a gate, with an MLP.

    c_{l+1} = c_0 * (W_l c_l + b_l) * sigmoid(G_l c_l) + c_l, with c_0 = e. Then, with a linear head w:
    parallel: logit = w . [c_L, MLP(c_0)]; stacked: w . MLP(c_L); cross_only: w . c_L.
    With gate ``none`` in slot ``cross`` this is DCN-V2.

    Differences from the official code: biases start at zero, not U(0, 1).

    Example:
        >>> from ctr_models import create_model, example_batch
        >>> schema = Schema.of({"user": 10, "item": 20})
        >>> create_model("gdcn", schema, form="stacked")(example_batch(schema, rows=3)).shape
        torch.Size([3])

    Source: arXiv 2311.04635.
    """

    Config = GDCNConfig
    config: GDCNConfig
    default_gates: ClassVar[Mapping[str, str]] = {"field": "none", "feature": "none", "cross": "sigmoid"}
    crossing: ClassVar[type[CrossNetwork]] = CrossNetwork
    source = "arXiv 2311.04635"

    def __init__(self, config: GDCNConfig, schema: Schema, gates: Mapping[str, GateSpec]) -> None:
        super().__init__(config, schema, gates)
        self.inputs = GatedEmbedding(schema, gates, std=config.embedding_std)
        width = self.inputs.width
        self.cross = self.crossing(width, layers=config.cross_layers, gate=gates["cross"])
        self.mlp = None if config.form == "cross_only" else MLP(width, config.mlp)
        deep = self.mlp.width if self.mlp is not None else 0
        self.head = linear({"parallel": width + deep, "stacked": deep, "cross_only": width}[config.form], 1)

    @takes_candidates
    def forward(self, batch: Batch | Candidates) -> Tensor:
        """Return logits, (B,)."""
        (c0,) = self.inputs(batch)  # (B, D)
        crossed = self.cross(c0)  # (B, D)
        if self.mlp is None:
            return self.head(crossed).squeeze(1)
        if self.config.form == "stacked":
            return self.head(self.mlp(crossed)).squeeze(1)
        # w . [c, h] as two products: no copy of both to put them side by side.
        split = crossed.shape[1]
        weight, deep = self.head.weight, self.mlp(c0)
        return (F.linear(crossed, weight[:, :split]) + F.linear(deep, weight[:, split:], self.head.bias)).squeeze(1)

    @torch.no_grad()
    def openness(self, batch: Batch) -> dict[int, dict[str, float]]:
        """Return how far the cross gates let each field's coordinates pass, for each order of crosses.

        Args:
            batch: over whose rows the masks are averaged, in evaluation mode.

        Returns:
            By order, from 2 to L + 1, and field: the mean of the mask.

        Example:
            >>> from ctr_models import Schema, create_model, example_batch
            >>> schema = Schema.of({"user": 10, "item": 20})
            >>> model = create_model("gdcn", schema, cross_layers=2, gates={"cross": "none"})
            >>> model.openness(example_batch(schema, rows=3))
            {2: {'user': 1.0, 'item': 1.0}, 3: {'user': 1.0, 'item': 1.0}}
        """
        was_training = self.training
        try:
            (c0,) = self.eval().inputs(batch)
            masks = self.cross.masks(c0)
        finally:
            self.train(was_training)
        embedding = self.inputs.embedding
        return {
            order: {
                name: float(part.mean())
                for name, part in zip(embedding.names, mask.split(embedding.dims, dim=1), strict=True)
            }
            for order, mask in enumerate(masks, start=2)
        }
