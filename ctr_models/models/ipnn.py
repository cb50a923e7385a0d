"""IPNN, the product-based network with inner products."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from ctr_models.batch import Batch
from ctr_models.gates.base import GateSpec
from ctr_models.layers.gated_embedding import GatedEmbedding
from ctr_models.layers.mlp import MLP, MLPConfig
from ctr_models.layers.products import InnerProducts
from ctr_models.model import CTRModel, ModelConfig, register_model
from ctr_models.schema import Schema


class IPNNConfig(ModelConfig):
    """Settings of ``ipnn``."""

    mlp: MLPConfig = MLPConfig()


@register_model("ipnn")
class IPNN(CTRModel):
    """logit = MLP([e, <e_i, e_j> for every pair of fields i < j]).

    The paper's product layer, W_z e + W_p p, is the first layer of this MLP. It writes W_p as an outer product
    to save work and has the products of fields with themselves in p; here W_p is whole and p has pairs only, as
    in the settings published for this model since.

    Raises:
        ConfigError: fields differ in dimension.

    Example:
        >>> from ctr_models import create_model, example_batch
        >>> schema = Schema.of({"user": 10, "item": 20})
        >>> create_model("ipnn", schema)(example_batch(schema, rows=3)).shape
        torch.Size([3])

    Source: arXiv 1611.00144.
    """

    Config = IPNNConfig
    default_gates: ClassVar[Mapping[str, str]] = {"field": "none", "feature": "none"}
    source = "arXiv 1611.00144"

    def __init__(self, config: IPNNConfig, schema: Schema, gates: Mapping[str, GateSpec]) -> None:
        super().__init__(config, schema, gates)
        schema.common_dim(self.name)
        self.inputs = GatedEmbedding(schema, gates, std=config.embedding_std)
        self.products = InnerProducts(self.inputs.fields)
        self.mlp = MLP(self.inputs.width + self.products.width, config.mlp, outputs=1)

    def forward(self, batch: Batch) -> Tensor:
        """Return logits, (B,)."""
        (x,) = self.inputs(batch)  # (B, D)
        products = self.products(x.unflatten(1, (self.inputs.fields, -1)))  # (B, P)
        return self.mlp(torch.cat([x, products], dim=1)).squeeze(1)
