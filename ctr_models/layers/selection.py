"""Which feature values a model may see: slot ``selection``, searched or decided."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ctr_models.batch import Batch
from ctr_models.embeddings import FeatureEmbedding
from ctr_models.errors import ConfigError
from ctr_models.gates.base import GateShape, GateSpec
from ctr_models.gates.selection import SelectionGate
from ctr_models.schema import Schema


class Selection(nn.Module):
    """Gives each feature value of a batch a mask. A subclass writes :meth:`forward`."""

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the masks by field: (B, 1) of a categorical one, (T, 1) of one that holds T values in all."""
        raise NotImplementedError

    def penalty(self) -> Tensor:
        """Return what is added to the loss, a scalar."""
        return torch.zeros(())


class SearchedSelection(Selection):
    """The gate of slot ``selection`` upon one learned logit s_v for each value v of each table.

    The logits stand in tables of dimension 1, looked up as embeddings are, and all begin at the gate's
    ``initial_logit``. Values that share a table share their logits. Numbers have no values and pass. The gate sees
    every value of the batch as a row of its own: ``x`` is (N, 1, 0), the logits are (N, 1).

    Args:
        schema: what the batch holds.
        gate: slot ``selection``.

    Raises:
        ConfigError: the schema has numbers only, or the gate is no :class:`SelectionGate`.

    Example:
        >>> from ctr_models import create_model, example_batch
        >>> schema = Schema.of({"user": 10, "item": 20}, dim=4)
        >>> selection = SearchedSelection(schema, GateSpec(name="annealed"))
        >>> {name: mask.shape for name, mask in selection(example_batch(schema, rows=3)).items()}
        {'user': torch.Size([3, 1]), 'item': torch.Size([3, 1])}
    """

    def __init__(self, schema: Schema, gate: GateSpec) -> None:
        super().__init__()
        names = _id_fields(schema)
        built = gate.build(GateShape(slot="selection", width=0, fields=1))
        if not isinstance(built, SelectionGate):
            raise ConfigError(
                f"gate {gate.name!r} says nothing of single values",
                where="model.gates.selection",
                remedy="derive it from ctr_models.gates.selection.SelectionGate",
            )
        self.gate = built
        self.logits = FeatureEmbedding(schema.with_dim(1), prefix="selection_", fields=names, unpooled=True)
        for weight in self.logits.table_parameters():
            nn.init.constant_(weight, built.initial_logit)

    def tables(self) -> dict[str, nn.Parameter]:
        """Return the logits of each table, (rows, 1)."""
        return self.logits.tables()

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the gate's masks."""
        pooled, jagged = self.logits.look_up(batch)
        logits = {} if pooled is None else dict(zip(self.logits.bag_names, pooled.split(1, dim=1), strict=True))
        logits |= {name: own.values() for name, own in jagged.items()}
        every = torch.cat(list(logits.values()))  # (N, 1)
        mask = self.gate(every.new_empty(every.shape[0], 1, 0), every).squeeze(2)
        return dict(zip(logits, mask.split([own.shape[0] for own in logits.values()]), strict=True))

    def penalty(self) -> Tensor:
        """Return what the gate asks for all rows of all tables, those outside the batch included."""
        return torch.stack([self.gate.value_penalty(weight) for weight in self.tables().values()]).sum()

    @torch.no_grad()
    def decided(self) -> dict[str, Tensor]:
        """Return the mask that each value gets when the search ends, by table, (rows,): 0 for what is dropped."""
        self.gate.harden()
        self.gate.eval()
        found = {}
        for table, logits in self.tables().items():
            flat = logits.detach().squeeze(1)
            found[table] = torch.where(self.gate.kept(flat), self.gate.mask(flat), 0.0)
        return found


class FixedSelection(Selection):
    """Masks that have been decided, one number a value.

    Args:
        schema: what the batch holds.
        masks: by table, (rows,); 0 for what is dropped.

    Example:
        >>> from ctr_models import example_batch
        >>> schema = Schema.of({"user": 3})
        >>> selection = FixedSelection(schema, {"user": torch.tensor([1.0, 0.0, 1.0])})
        >>> selection(example_batch(schema, rows=2))["user"].shape
        torch.Size([2, 1])
    """

    def __init__(self, schema: Schema, masks: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._table_of = {f.name: f.table for f in (*schema.sparse, *schema.sequences)}
        self._places = {table: f"masks{number}" for number, table in enumerate(schema.tables)}
        for table, place in self._places.items():
            self.register_buffer(place, masks[table].float())

    def masks(self) -> dict[str, Tensor]:
        """Return the masks of each table, (rows,)."""
        return {table: getattr(self, place) for table, place in self._places.items()}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the decided masks."""
        masks = self.masks()
        jagged = {**batch.sparse.to_dict(), **batch.sequences.to_dict()}
        return {n: masks[table][jagged[n].values()].unsqueeze(1) for n, table in self._table_of.items()}


def _id_fields(schema: Schema) -> list[str]:
    names = [f.name for f in (*schema.sparse, *schema.sequences)]
    if not names:
        raise ConfigError(
            "slot selection needs features with values of their own, there are numbers only",
            where="model.gates.selection",
            remedy="cut numbers into buckets with encode: {how: quantile}",
        )
    return names
