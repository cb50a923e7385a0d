"""Models that rank items by a user's history: a logit for a row, or a score for every item of the catalogue."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ctr_models.batch import Batch
from ctr_models.embeddings import FeatureEmbedding
from ctr_models.errors import ConfigError, nearest
from ctr_models.gates.base import GateSpec
from ctr_models.layers.linear_term import LinearTerm
from ctr_models.layers.sequence_encoder import EncoderConfig, SASRecEncoderConfig, SequenceEncoder
from ctr_models.layers.transitions import TransitionDistillation
from ctr_models.model import CTRModel, ModelConfig
from ctr_models.schema import IdField, Schema

FIRST_ITEM = 2
"""Rows 0 and 1 of a table stand for missing and unknown: they are never ranked."""


class NextItemConfig(ModelConfig):
    """Settings that every next-item model has."""

    encoder: EncoderConfig = SASRecEncoderConfig()
    history: str | None = None
    """The history that is encoded; None: the first that shares the table of its target."""
    linear: bool = True
    """Whether a weight for each value of every field is added, as in ``lr``. Off to rank by the history alone."""


class Positions(NamedTuple):
    """What a batch has to say of the next item, at every place of every history that has one.

    Args:
        encoded: history up to the place, (P, d).
        target: item that came next, counted from the first real one, (P,) int64.
        items: different items that stand at any place, counted likewise, (M,) int64.
    """

    encoded: Tensor
    target: Tensor
    items: Tensor


class NextItemModel(CTRModel):
    """logit = <u, e_item> + w(x): the encoded history u on the item's vector, plus a linear term of all fields.

    The history shares the item's table, so that <u, e_j> scores every item j: :meth:`users` and :meth:`items` rank
    a whole catalogue. Recipe ``next_item`` trains it for that. Without histories only the linear term is left.

    Raises:
        ConfigError: no history shares the table of its target; neither history nor linear term.
    """

    Config = NextItemConfig
    config: NextItemConfig

    def __init__(self, config: NextItemConfig, schema: Schema, gates: Mapping[str, GateSpec]) -> None:
        super().__init__(config, schema, gates)
        self.objective: NextItemLoss | None = None
        """Set by recipe ``next_item``, which does not train for clicks."""
        self.linear = LinearTerm(schema, std=config.embedding_std) if config.linear else None
        history = _history_of(schema, config.history)
        if history is None:
            if self.linear is None:
                raise ConfigError(
                    "without a history and without a linear term nothing is left",
                    where="model.linear",
                    remedy="set it to true, or give a sequence whose target shares its table",
                )
            return
        self.history, self.item = history.name, str(history.target)
        self.inputs = FeatureEmbedding(schema, std=config.embedding_std, fields=[self.item, self.history])
        self.encoder = SequenceEncoder(
            history.dim, config.encoder, max_length=history.max_length, std=config.embedding_std
        )

    @property
    def ranks(self) -> bool:
        """Whether there is a history, and nothing but it decides."""
        return hasattr(self, "encoder") and self.linear is None

    def forward(self, batch: Batch) -> Tensor:
        """Return logits, (B,)."""
        parts = [] if self.linear is None else [self.linear(batch)]
        if hasattr(self, "encoder"):
            embedded = self.inputs(batch)
            history = embedded.sequences[self.history]
            user = self.encoder.last(history.values(), history.offsets())  # (B, d)
            parts.append((user * embedded.field(self.item)).sum(1))
        return torch.stack(parts).sum(0).float()

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the training loss and the logits (B,); the objective's loss where a recipe has set one."""
        if self.objective is None:
            return super().loss(batch)
        return self.penalized(self.objective(self, batch)), batch.label.new_zeros(len(batch))

    def users(self, batch: Batch) -> Tensor:
        """Return the encoded histories, (B, d)."""
        history = self.inputs(batch).sequences[self.history]
        return self.encoder.last(history.values(), history.offsets())

    def items(self) -> Tensor:
        """Return the vectors of all real items, (N, d); the first is that of id 2."""
        table = next(f.table for f in self.schema.sequences if f.name == self.history)
        return self.inputs.align(self.history, self.inputs.tables()[table])[FIRST_ITEM:]

    def positions(self, batch: Batch) -> Positions:
        """Return every place whose next item is known: inside the history, and its end with the row's item.

        Missing and unknown items are seen as part of a history, and never a target.
        """
        ids = batch.sequences[self.history].values().long()  # (T,)
        last = batch.sparse[self.item].values().long()  # (B,)
        history = self.inputs(batch).sequences[self.history]
        offsets = history.offsets().long()
        encoded = self.encoder(history.values(), offsets)  # (T, d)
        target = torch.cat([ids[1:], ids.new_zeros(1)])[: len(ids)]
        some = offsets.diff() > 0
        ends = offsets[1:][some]
        target = target.index_put((ends - 1,), last[some])
        age = torch.repeat_interleave(offsets[1:], offsets.diff()) - 1 - torch.arange(len(ids), device=ids.device)
        seen = age < self.encoder.length
        known = torch.nonzero(seen & (target >= FIRST_ITEM)).squeeze(1)
        real = ids[seen & (ids >= FIRST_ITEM)]
        return Positions(encoded[known], target[known] - FIRST_ITEM, real.unique() - FIRST_ITEM)


class NextItemLoss(nn.Module):
    """Mean cross-entropy of the item that came next, by softmax over all real items, plus the distillation.

    Args:
        distillation: of transition counts, or None.
        weight: of the distillation.

    Source: arXiv 2311.01056.
    """

    def __init__(self, distillation: TransitionDistillation | None = None, weight: float = 0.1) -> None:
        super().__init__()
        self.distillation, self.weight = distillation, weight

    def forward(self, model: NextItemModel, batch: Batch) -> Tensor:
        """Return the loss, a scalar; its largest tensor is (places, items)."""
        encoded, target, given = model.positions(batch)
        items = model.items()
        loss = F.cross_entropy(encoded @ items.T, target, reduction="sum") / max(1, len(target))
        return loss if self.distillation is None else loss + self.weight * self.distillation(items, given)


def _history_of(schema: Schema, name: str | None) -> IdField | None:
    """Return the history that is to be encoded, None if there is none at all."""
    tables = {f.name: f.table for f in schema.sparse}
    fitting = {f.name: f for f in schema.sequences if f.target is not None and tables.get(f.target) == f.table}
    if name is not None and name not in fitting:
        raise ConfigError(
            f"no history {name!r} that shares the table of its target",
            where="model.history",
            remedy=nearest(name, fitting),
        )
    if schema.sequences and not fitting:
        raise ConfigError(
            f"no history ({', '.join(f.name for f in schema.sequences)}) shares the table of its target",
            where="features",
            remedy="give one the item's table and target, for example table: item_id, target: item_id",
        )
    return fitting[name] if name is not None else next(iter(fitting.values()), None)
