"""DIN."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import JaggedTensor

from ctr_models.batch import Batch
from ctr_models.embeddings import Embedded
from ctr_models.gates.base import GateSpec
from ctr_models.layers.gated_embedding import GatedEmbedding
from ctr_models.layers.interest import Interest
from ctr_models.layers.mlp import MLP, MLPConfig
from ctr_models.layers.sequence_encoder import EncoderConfig, SequenceEncoder
from ctr_models.layers.target_attention import TargetAttentionConfig
from ctr_models.model import CTRModel, ModelConfig, register_model
from ctr_models.schema import Schema


class DINConfig(ModelConfig):
    """Settings of ``din``."""

    attention: TargetAttentionConfig = TargetAttentionConfig()
    mlp: MLPConfig = MLPConfig(hidden=(200, 80), activation="dice")
    encoder: EncoderConfig | None = None
    """Self-attention over a history's behaviours before they meet the candidate; null: as they are."""


@register_model("din")
class DIN(CTRModel):
    """logit = MLP([e, v]), where v = sum_j a(k_j, q) k_j of a history's behaviours k_j and its candidate q.

    The scores a are not normalised, so that v keeps how strong an interest is. Slot ``sequence`` may sum the
    behaviours in another way. Without histories this is ``dnn``. Train with ``train.embedding.l2_mode: touched``
    for the paper's mini-batch aware regularisation.

    Differences from the official code: sum instead of softmax, as in the paper; Dice and batch normalisation use
    the batch's statistics in training and moving averages afterwards; padding does not exist; ``encoder`` is ours.

    Raises:
        ConfigError: there are histories, but none has a target; a history and its target differ in dimension.

    Example:
        >>> from ctr_models import IdField, create_model, example_batch
        >>> item = IdField(name="item", rows=20)
        >>> clicks = IdField(name="clicks", rows=20, table="item", kind="sequence", target="item", max_length=9)
        >>> schema = Schema(sparse=(item,), sequences=(clicks,))
        >>> create_model("din", schema)(example_batch(schema, rows=3)).shape
        torch.Size([3])

    Source: arXiv 1706.06978.
    """

    Config = DINConfig
    default_gates: ClassVar[Mapping[str, str]] = {"sequence": "none", "field": "none", "feature": "none"}
    source = "arXiv 1706.06978"

    def __init__(self, config: DINConfig, schema: Schema, gates: Mapping[str, GateSpec]) -> None:
        super().__init__(config, schema, gates)
        self.inputs = GatedEmbedding(schema, gates, std=config.embedding_std)
        self.interest = Interest(schema, config.attention, gates["sequence"])
        self.encoders = nn.ModuleDict()
        if config.encoder is not None:
            for f in schema.sequences:
                if f.target is not None:
                    self.encoders[f.name] = SequenceEncoder(
                        f.dim, config.encoder, max_length=f.max_length, std=config.embedding_std
                    )
        self.mlp = MLP(self.inputs.width, config.mlp, outputs=1)

    def forward(self, batch: Batch) -> Tensor:
        """Return logits, (B,)."""
        embedded = self.interest(self._encoded(self.inputs.embed(batch)))
        (x,) = self.inputs.gated(batch, embedded)  # (B, D)
        return self.mlp(x).squeeze(1)

    def _encoded(self, embedded: Embedded) -> Embedded:
        sequences = dict(embedded.sequences)
        for name, encoder in self.encoders.items():
            own = sequences[name]
            values = encoder(own.values(), own.offsets())  # (T, d)
            sequences[name] = JaggedTensor(values=values, lengths=own.lengths(), offsets=own.offsets())
        return replace(embedded, sequences=sequences)
