"""What a model knows of its inputs: names, kinds, table sizes and dimensions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer, model_validator

from ctr_models.errors import ConfigError

Role = Literal["user", "item", "context"]
Kind = Literal["categorical", "multi", "sequence"]


class DenseField(BaseModel):
    """One number a row. Models embed it as the number times a learned vector of ``dim``."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    dim: int = 16
    role: Role = "context"


class IdField(BaseModel):
    """Ids into an embedding table: one a row, several, or a behaviour history in order of time.

    Id 0 stands for a missing value and id 1 for one that the vocabulary does not hold; both are rows
    like any other. ``rows`` counts them. Fields of one ``table`` share its rows and must agree on them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    rows: int
    dim: int = 16
    kind: Kind = "categorical"
    table: str = ""
    role: Role = "context"
    target: str | None = None
    """For a sequence: the categorical field of the candidate that it is matched against."""
    max_length: int = 1
    of: tuple[str, ...] = ()
    """For a cross: the fields whose values together are its own."""
    rank: int | None = None
    """Dimension of the table's rows where that is not ``dim``: a linear layer takes each vector to ``dim``."""

    @model_validator(mode="after")
    def _own_table(self) -> IdField:
        if not self.table:
            object.__setattr__(self, "table", self.name)
        return self

    @property
    def stored(self) -> int:
        """Dimension of the table's rows."""
        return self.rank or self.dim


class Schema(BaseModel):
    """The model's side of a FeatureSpec: every input, in the one order that a Batch keeps.

    Example:
        >>> schema = Schema.of({"user": 1000, "item": 500}, dense=["price"], dim=8)
        >>> [f.name for f in schema.sparse], schema.width
        (['user', 'item'], 24)
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    dense: tuple[DenseField, ...] = ()
    sparse: tuple[IdField, ...] = ()
    """categorical and multi fields"""
    sequences: tuple[IdField, ...] = ()
    tasks: tuple[str, ...] = ()
    """What else than the click may be predicted: the columns of ``Batch.targets``"""

    @classmethod
    def of(
        cls,
        categorical: Mapping[str, int],
        *,
        dense: Sequence[str] = (),
        dim: int = 16,
        roles: Mapping[str, Role] | None = None,
        tasks: Sequence[str] = (),
    ) -> Schema:
        """Build a schema of plain fields by hand, as in a notebook: names to table sizes."""
        roles = roles or {}
        return cls(
            dense=tuple(DenseField(name=n, dim=dim, role=roles.get(n, "context")) for n in dense),
            sparse=tuple(
                IdField(name=n, rows=rows, dim=dim, role=roles.get(n, "context")) for n, rows in categorical.items()
            ),
            tasks=tuple(tasks),
        )

    @model_serializer(mode="wrap")
    def _written(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # A run that was begun before there were tasks can be taken up again.
        tree = write(self)
        if not self.tasks:
            tree.pop("tasks", None)
        return tree

    @model_validator(mode="after")
    def _consistent(self) -> Schema:
        if len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"tasks appear twice: {list(self.tasks)}")
        names = [f.name for f in self.fields]
        twice = {n for n in names if names.count(n) > 1}
        if twice:
            raise ValueError(f"field names appear twice: {sorted(twice)}")
        tables: dict[str, tuple[int, int, int]] = {}
        for f in (*self.sparse, *self.sequences):
            size = (f.rows, f.dim, f.stored)
            if tables.setdefault(f.table, size) != size:
                raise ValueError(f"fields of table {f.table!r} differ in rows or dim")
        for f in self.sequences:
            if f.target is not None and f.target not in names:
                raise ValueError(f"sequence {f.name!r} has target {f.target!r}, which is no field")
        for f in self.sparse:
            if not set(f.of) <= set(names):
                raise ValueError(f"cross {f.name!r} is of {sorted(set(f.of) - set(names))}, which are no fields")
        return self

    @property
    def fields(self) -> tuple[DenseField | IdField, ...]:
        """All fields: dense, sparse, sequences."""
        return (*self.dense, *self.sparse, *self.sequences)

    @property
    def width(self) -> int:
        """Length D of the concatenated embedding of one row."""
        return sum(f.dim for f in self.fields)

    @property
    def tables(self) -> dict[str, IdField]:
        """One field for each embedding table, by table name."""
        return {f.table: f for f in (*self.sequences, *self.sparse)}

    def common_dim(self, model: str) -> int:
        """Return the dimension d that all fields share, for models that stack them as (B, F, d).

        Args:
            model: who asks, for the message.

        Raises:
            ConfigError: the fields differ in dimension, or there is none.
        """
        dims = {f.name: f.dim for f in self.fields}
        if len(set(dims.values())) != 1:
            raise ConfigError(
                f"{model} needs fields of one dimension, found {dims}",
                where="model",
                remedy="give every feature the same dim",
            )
        return next(iter(dims.values()))

    def only(self, names: set[str] | Sequence[str]) -> Schema:
        """Return the schema of the named fields.

        A sequence whose target is dropped keeps no target; a cross one of whose parts is dropped is a plain field.
        """
        kept = set(names)
        return Schema(
            dense=tuple(f for f in self.dense if f.name in kept),
            sparse=tuple(
                f if kept.issuperset(f.of) else f.model_copy(update={"of": ()})
                for f in self.sparse
                if f.name in kept
            ),
            sequences=tuple(
                f if f.target in kept else f.model_copy(update={"target": None})
                for f in self.sequences
                if f.name in kept
            ),
            tasks=self.tasks,
        )

    def with_dim(self, dim: int) -> Schema:
        """Return the same fields with one embedding dimension."""
        return Schema(
            dense=tuple(f.model_copy(update={"dim": dim}) for f in self.dense),
            sparse=tuple(f.model_copy(update={"dim": dim, "rank": None}) for f in self.sparse),
            sequences=tuple(f.model_copy(update={"dim": dim, "rank": None}) for f in self.sequences),
            tasks=self.tasks,
        )
