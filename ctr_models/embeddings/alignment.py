"""From tables of different dimensions to vectors of the one that a model asks for."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ctr_models.schema import IdField


class Alignment(nn.Module):
    """Takes each vector of a table whose rows are shorter than its fields' dimension to that dimension: x W_t.

    One matrix W_t a table, so that fields that share a table, such as an item and the history of items, stay in one
    space; without a bias, so that an empty field stays zero. A field without a ``rank`` passes as it is.

    Args:
        fields: the fields of the tables.
        prefix: put before table names.

    Example:
        >>> import torch
        >>> align = Alignment([IdField(name="item", rows=9, dim=8, rank=3), IdField(name="hour", rows=9, dim=8)])
        >>> align("item", torch.zeros(2, 3)).shape, align("hour", torch.zeros(2, 8)).shape, len(align)
        (torch.Size([2, 8]), torch.Size([2, 8]), 1)

    Source: FDO of GDCN, arXiv 2311.04635.
    """

    def __init__(self, fields: Sequence[IdField], prefix: str = "") -> None:
        super().__init__()
        ranked = {f.table: f for f in fields if f.rank is not None}
        self.tables = nn.ModuleDict()
        for table, f in ranked.items():
            self.tables[prefix + table] = layer = nn.Linear(f.stored, f.dim, bias=False)
            nn.init.xavier_normal_(layer.weight)
        self._table_of = {f.name: prefix + f.table for f in fields if f.table in ranked}

    def __len__(self) -> int:
        """Return the number of tables that are aligned."""
        return len(self.tables)

    def forward(self, field: str, x: Tensor) -> Tensor:
        """Return the vectors of a field, (N, rank), as (N, dim)."""
        table = self._table_of.get(field)
        return x if table is None else self.tables[table](x)
