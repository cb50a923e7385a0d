"""Logistic regression."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ctr_models.batch import Batch
from ctr_models.candidates import Candidates, takes_candidates
from ctr_models.gates.base import GateSpec
from ctr_models.layers.linear_term import LinearTerm
from ctr_models.model import CTRModel, ModelConfig, register_model
from ctr_models.schema import Schema


@register_model("lr")
class LR(CTRModel):
    """logit = b + sum of one weight for each feature value: the baseline of baselines. It has no gate slot.

    Example:
        >>> from ctr_models import create_model, example_batch
        >>> schema = Schema.of({"user": 10, "item": 20})
        >>> create_model("lr", schema)(example_batch(schema, rows=3)).shape
        torch.Size([3])
    """

    def __init__(self, config: ModelConfig, schema: Schema, gates: Mapping[str, GateSpec]) -> None:
        super().__init__(config, schema, gates)
        self.linear = LinearTerm(schema, std=config.embedding_std)

    @takes_candidates
    def forward(self, batch: Batch | Candidates) -> Tensor:
        """Return logits, (B,)."""
        return self.linear(batch)
