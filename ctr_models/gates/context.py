"""What decides a gate: a learned vector, the gated vector itself, or chosen fields."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import nn

from ctr_models.batch import Batch
from ctr_models.candidates import Candidates
from ctr_models.embeddings import Embedded, FeatureEmbedding
from ctr_models.errors import ConfigError, nearest
from ctr_models.gates.base import GateConfig, GateShape, GateSpec
from ctr_models.schema import DenseField, IdField, Schema
from ctr_models.shared_rows import Rows, SharedRows

ROLES = ("user", "item", "context")
INNER = ("learned", "self")
"""Contexts that the gate finds in itself; the others are supplied by the model."""


class ContextConfig(GateConfig):
    """Settings of a gate that a context decides."""

    context: str | tuple[str, ...] = Field("self", min_length=1)
    """``learned``: one learned vector. ``self``: what is gated. ``user``, ``item``, ``context``: the fields of
    that role, histories left out. Or the name of a field, where no field has such a role. ``+`` joins several:
    ``user+hour``. A list gives each stream of the model its own."""
    tables: Literal["own", "shared"] = "own"
    """Whether context fields have tables of their own, as published, or share the model's embeddings."""

    @field_validator("context", mode="before")
    @classmethod
    def _as_tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value


def stream_spec(spec: GateSpec, stream: int, streams: int) -> GateSpec:
    """Return the gate of one stream: its own entry where ``context`` is a list.

    Raises:
        ConfigError: the list does not have one entry a stream.

    Example:
        >>> stream_spec(GateSpec.parse({"name": "sigmoid2", "context": ["user", "item"]}), 1, 2).options["context"]
        'item'
    """
    context = getattr(spec.config(), "context", None)
    if not isinstance(context, tuple):
        return spec
    if len(context) != streams:
        raise ConfigError(
            f"context {list(context)} has {len(context)} entries, the model has {streams} streams",
            where=f"gate {spec.name}: context",
            remedy=f"give one entry a stream, or one for all: context: {'+'.join(context)}",
        )
    return GateSpec(name=spec.name, options={**spec.options, "context": context[stream]})


class GateContext(nn.Module):
    """Supplies a gate's context from the batch.

    Args:
        schema: what the batch holds.
        gate: the gate; one whose config has no ``context`` gets none.
        embedding: the model's own embedding, whose fields the context may name; ``tables: shared`` reads them.
        std: standard deviation of the initial vectors of own tables.
        prefix: put before the names of own tables.

    Raises:
        ConfigError: the context names no field of the schema.
    """

    def __init__(
        self, schema: Schema, gate: GateSpec, *, embedding: FeatureEmbedding, std: float, prefix: str
    ) -> None:
        super().__init__()
        config = gate.config()
        word = getattr(config, "context", "self")
        embedded = schema.only(embedding.names)
        self.names = () if word in INNER else _field_names(embedded, word, f"gate {gate.name}: context")
        self.width = 0
        self.embedding: FeatureEmbedding | None = None
        if not self.names:
            return
        if config.tables == "own":  # type: ignore[attr-defined]
            self.embedding = FeatureEmbedding(schema, std=std, prefix=prefix, fields=self.names)
            self.width = self.embedding.width
        else:
            dims = dict(zip(embedding.names, embedding.dims, strict=True))
            self.width = sum(dims[n] for n in self.names)

    def forward(self, batch: Batch | Candidates, embedded: Embedded) -> Rows | None:
        """Return the context, (B, C), or None when the gate finds it in itself."""
        if not self.names:
            return None
        if self.embedding is not None:
            return self.embedding(batch).flat
        if isinstance(embedded.flat, SharedRows):
            return embedded.flat.pick(self.names)
        return torch.cat([embedded.field(n) for n in self.names], dim=1)


def require_context(config: ContextConfig, shape: GateShape) -> None:
    """Refuse a context that the gate would have to find in itself, where it knows ``self`` alone.

    Raises:
        ConfigError: the model supplies none and the config does not say ``self``.
    """
    if not shape.context and config.context != "self":
        raise ConfigError(
            f"context {config.context!r} has to be supplied by the model, which gives none here",
            where=f"model.gates.{shape.slot}",
            remedy="use 'self', a role or names of fields",
        )


def _field_names(schema: Schema, word: str, where: str) -> tuple[str, ...]:
    names: list[str] = []
    candidates: list[DenseField | IdField] = [*schema.dense, *schema.sparse]
    known = [f.name for f in schema.fields]
    for part in word.split("+"):
        found = [f.name for f in candidates if f.role == part]
        if not found and part in known:
            found = [part]
        if not found and part in ROLES:
            raise ConfigError(
                f"no field has role {part!r}", where=where, remedy="set role on a feature, or name fields"
            )
        if not found:
            raise ConfigError(f"no field {part!r}", where=where, remedy=nearest(part, [*known, *ROLES, *INNER]))
        names.extend(found)
    return tuple(dict.fromkeys(names))
