"""The plain deep network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from ctr_models.batch import Batch
from ctr_models.candidates import Candidates, takes_candidates
from ctr_models.gates.base import GateSpec
from ctr_models.layers.exits import Exits, ExitsConfig
from ctr_models.layers.gated_embedding import GatedEmbedding
from ctr_models.layers.mlp import MLP, MLPConfig
from ctr_models.model import CTRModel, ModelConfig, register_model
from ctr_models.schema import Schema
from ctr_models.shared_rows import joined


class DNNConfig(ModelConfig):
    """Settings of ``dnn``."""

    mlp: MLPConfig = MLPConfig()
    exits: ExitsConfig = ExitsConfig()
    """The price of depth, where slot ``depth`` has a gate."""


@register_model("dnn")
class DNN(CTRModel):
    """logit = MLP(e) over the concatenated embeddings.

    With a gate in slot ``depth`` the MLP has an exit behind every hidden layer, and a row leaves it where the gate
    says that more layers are not worth their cost (:class:`ctr_models.layers.Exits`).

    Example:
        >>> from ctr_models import create_model, example_batch
        >>> schema = Schema.of({"user": 10, "item": 20})
        >>> create_model("dnn", schema, mlp={"hidden": [8]})(example_batch(schema, rows=3)).shape
        torch.Size([3])
    """

    Config = DNNConfig
    config: DNNConfig
    default_gates: ClassVar[Mapping[str, str]] = {"field": "none", "feature": "none", "depth": "none"}

    def __init__(self, config: DNNConfig, schema: Schema, gates: Mapping[str, GateSpec]) -> None:
        super().__init__(config, schema, gates)
        self.inputs = GatedEmbedding(schema, gates, std=config.embedding_std)
        self.mlp = MLP(self.inputs.width, config.mlp, outputs=1)
        depth = gates["depth"]
        self.exits = None if depth.name == "none" else Exits(self.mlp, depth, config.exits)

    @takes_candidates
    def forward(self, batch: Batch | Candidates) -> Tensor:
        """Return logits, (B,)."""
        (x,) = self.inputs(batch)  # (B, D)
        if self.exits is None:
            return self.mlp(x).squeeze(1)
        # Leaving out layers row by row is no program of fixed steps.
        if self.training or torch.compiler.is_compiling():
            return self.exits(self.mlp, joined(x)).taken()
        return self.exits.early(self.mlp, joined(x))

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the training loss and the logits, (B,); with exits, their expected loss and cost."""
        if self.exits is None:
            return super().loss(batch)
        (x,) = self.inputs(batch)
        passage = self.exits(self.mlp, x)
        return self.penalized(self.exits.loss(passage, batch.label)), passage.taken()

    @torch.no_grad()
    def telemetry(self, batch: Batch) -> dict[str, dict[str, float]]:
        """Describe the gates, and each exit's share and calibration as ``exits.<number>``."""
        seen = super().telemetry(batch)
        if self.exits is None:
            return seen
        was_training = self.training
        try:
            self.eval()
            (x,) = self.inputs(batch)
            passage = self.exits(self.mlp, x)
        finally:
            self.train(was_training)
        for number, gate in enumerate(self.exits.gates):  # of all rows, not of those that reach it
            seen[f"exits.gates.{number}"] = gate.telemetry(passage.on[:, number])
        report = self.exits.report(passage, batch.label)
        return seen | {f"exits.{name}": figures for name, figures in report.items()}
