"""Embedding, field gate, feature gate: the way from a batch into the streams of a model."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor, nn

from ctr_models.batch import Batch
from ctr_models.candidates import Candidates
from ctr_models.embeddings import Embedded, FeatureEmbedding
from ctr_models.errors import ConfigError
from ctr_models.gates.base import Gate, GateShape, GateSpec
from ctr_models.gates.context import GateContext, stream_spec
from ctr_models.schema import Schema
from ctr_models.shared_rows import Rows, SharedRows, joined


class GatedEmbedding(nn.Module):
    """Embeds a batch and gates it: first slot ``field``, then slot ``feature`` for each stream.

    Args:
        schema: what the batch holds.
        gates: the gates of slots ``field`` and ``feature``; a missing slot is ungated.
        std: standard deviation of the initial embeddings.
        streams: number of streams, each with its own feature gate.
        prefix: put before table names.
        fields: the fields to embed; all by default.

    Raises:
        ConfigError: a field gate where fields differ in dimension; a context that the schema does not hold.

    Example:
        >>> from ctr_models import Schema, example_batch
        >>> schema = Schema.of({"user": 10, "item": 20}, dim=4)
        >>> layer = GatedEmbedding(schema, {"feature": GateSpec(name="sigmoid2")}, std=0.1, streams=2)
        >>> [stream.shape for stream in layer(example_batch(schema, rows=3))]
        [torch.Size([3, 8]), torch.Size([3, 8])]
    """

    def __init__(
        self,
        schema: Schema,
        gates: Mapping[str, GateSpec],
        *,
        std: float,
        streams: int = 1,
        prefix: str = "",
        fields: Collection[str] | None = None,
    ) -> None:
        super().__init__()
        none = GateSpec(name="none")
        self.embedding = FeatureEmbedding(schema, std=std, prefix=prefix, fields=fields)
        self.width, self.fields = self.embedding.width, len(self.embedding.names)

        field = gates.get("field", none)
        if field.name != "none" and not self.embedding.uniform:
            dims = dict(zip(self.embedding.names, self.embedding.dims, strict=True))
            raise ConfigError(
                f"a field gate needs fields of one dimension, found {dims}",
                where="model.gates.field",
                remedy="give every feature the same dim, or gate slot 'feature'",
            )
        field = stream_spec(field, 0, 1)
        self.field_context = GateContext(schema, field, embedding=self.embedding, std=std, prefix=f"{prefix}field_")
        self.field_gate = field.build(
            GateShape(
                slot="field", width=self.embedding.dims[0], context=self.field_context.width, fields=self.fields
            )
        )
        feature = gates.get("feature", none)
        self.contexts, self.feature_gates = nn.ModuleList(), nn.ModuleList()
        for stream in range(streams):
            spec = stream_spec(feature, stream, streams)
            context = GateContext(
                schema, spec, embedding=self.embedding, std=std, prefix=f"{prefix}context{stream + 1}_"
            )
            self.contexts.append(context)
            self.feature_gates.append(
                spec.build(GateShape(slot="feature", width=self.width, context=context.width, fields=self.fields))
            )
        self._field_gated = field.name != "none"

    def embed(self, batch: Batch | Candidates) -> Embedded:
        """Return the ungated vectors."""
        return self.embedding(batch)

    def forward(self, batch: Batch | Candidates) -> list[Rows]:
        """Return the gated input of each stream, (B, D)."""
        return self.gated(batch, self.embedding(batch))

    def gated(self, batch: Batch | Candidates, embedded: Embedded) -> list[Rows]:
        """Return the gated input of each stream, (B, D), from vectors that are at hand.

        Of candidates, rows stay apart from what they share wherever the gate's mask is the same for all candidates
        of a user.
        """
        x = embedded.flat
        if self._field_gated:
            x = _gated(self.field_gate, x, self.field_context(batch, embedded))
        return [
            _gated(gate, x, context(batch, embedded))
            for gate, context in zip(self.feature_gates, self.contexts, strict=True)
        ]


def _gated(gate: Gate, x: Rows, context: Rows | None) -> Rows:
    """Return what passes a gate, (B, D)."""

    def as_gated(rows: Tensor) -> Tensor:
        return rows.unflatten(1, (gate.shape.fields, -1)) if gate.shape.slot == "field" else rows

    of_users = not isinstance(context, SharedRows) or not context.own.shape[1]
    if isinstance(x, SharedRows) and gate.by_context and of_users:
        if gate.name == "none":
            return x
        # Of such a gate's x no more is read than its shape.
        users = as_gated(x.shared.new_zeros(()).expand(len(x.shared), x.columns.width))
        mask = gate(users, context.shared if isinstance(context, SharedRows) else context)
        if mask.shape[1:] != users.shape[1:]:
            mask = mask.expand(-1, *users.shape[1:])
        return x.masked(mask.flatten(1))
    context = None if context is None else joined(context)
    return gate.gated(as_gated(joined(x)), context).flatten(1)
