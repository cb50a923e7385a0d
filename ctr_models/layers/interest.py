"""From behaviour histories to what of them concerns the candidate."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from ctr_models.embeddings import Embedded
from ctr_models.errors import ConfigError
from ctr_models.gates.base import GateShape, GateSpec
from ctr_models.layers.target_attention import TargetAttention, TargetAttentionConfig
from ctr_models.schema import Schema


class Interest(nn.Module):
    """Puts v = sum_j score_j k_j in the place where ``flat`` holds the mean of a history's behaviours k_j.

    Each history has its own :class:`TargetAttention`, asked by the field that its ``target`` names, and its own
    gate in slot ``sequence``, which does the sum. A history without a target keeps its mean. Without histories
    nothing changes.

    Args:
        schema: what the batch holds.
        attention: the perceptron of each attention.
        gate: slot ``sequence``.

    Raises:
        ConfigError: no history has a target, or a history and its target differ in dimension.

    Example:
        >>> from ctr_models import FeatureEmbedding, IdField, example_batch
        >>> item = IdField(name="item", rows=20, dim=4)
        >>> clicks = IdField(name="clicks", rows=20, dim=4, table="item", kind="sequence", target="item")
        >>> schema = Schema(sparse=(item,), sequences=(clicks,))
        >>> embedded = FeatureEmbedding(schema)(example_batch(schema, rows=3))
        >>> interest = Interest(schema, TargetAttentionConfig(), GateSpec(name="none"))
        >>> interest(embedded).flat.shape
        torch.Size([3, 8])
    """

    def __init__(self, schema: Schema, attention: TargetAttentionConfig, gate: GateSpec) -> None:
        super().__init__()
        dims = {f.name: f.dim for f in schema.fields}
        self.targets = targets_of(schema)
        for name, target in self.targets.items():
            if dims[name] != dims[target]:
                raise ConfigError(
                    f"history {name!r} has dim {dims[name]}, its target {target!r} has {dims[target]}",
                    where=f"features: {name}",
                    remedy="let both share a table, or give them one dim",
                )
        self.attentions = nn.ModuleList(TargetAttention(dims[n], attention) for n in self.targets)
        self.gates = nn.ModuleList(
            gate.build(GateShape(slot="sequence", width=dims[n], context=dims[n])) for n in self.targets
        )

    def forward(self, embedded: Embedded) -> Embedded:
        """Return the same vectors, with interests in the histories' places of ``flat``."""
        if not self.targets:
            return embedded
        pooled = {}
        for (name, target), attention, gate in zip(self.targets.items(), self.attentions, self.gates, strict=True):
            history, query = embedded.sequences[name], embedded.field(target)
            values, offsets = history.values(), history.offsets()
            pooled[name] = gate.pool(values, attention(values, offsets, query), offsets, query)  # (B, d)
        parts = [pooled[n] if n in pooled else embedded.field(n) for n in embedded.names]
        return replace(embedded, flat=torch.cat(parts, dim=1))


def targets_of(schema: Schema) -> dict[str, str]:
    """Return the histories that are matched against a candidate, each with the name of its target.

    Raises:
        ConfigError: there are histories, but none has a target.
    """
    found = {f.name: f.target for f in schema.sequences if f.target is not None}
    if schema.sequences and not found:
        names = ", ".join(f.name for f in schema.sequences)
        raise ConfigError(
            f"no history ({names}) says which field of the candidate it is matched against",
            where="features",
            remedy="give one a target, for example target: item_id",
        )
    return found
