"""The FeatureSpec: what each column of a log is and how it is encoded."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from ctr_models.errors import nearest
from ctr_models.schema import Kind as IdKind
from ctr_models.schema import Role

LABEL = "__label__"
"""The encoded column of the label."""


def task_label(task: str) -> str:
    """Return the encoded column of a further task's label.

    Example:
        >>> task_label("conversion")
        '__label_conversion__'
    """
    return f"__label_{task}__"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Vocabulary(_Strict):
    """Each value seen at least ``min_count`` times in training has its own id, the others share id 1."""

    how: Literal["vocabulary"] = "vocabulary"
    min_count: int = Field(1, ge=1)
    max_size: int | None = Field(None, ge=1)
    """Keep at most this many values, the most frequent first."""


class Hash(_Strict):
    """Ids by a stable hash: nothing to fit, nothing to grow, collisions accepted."""

    how: Literal["hash"] = "hash"
    buckets: int = Field(ge=1, le=2**31 - 8)
    salt: int = 0


class Quantile(_Strict):
    """Numbers cut at quantiles of the training data into ids."""

    how: Literal["quantile"] = "quantile"
    buckets: int = Field(20, ge=2, le=65536)


class LogBucket(_Strict):
    """Numbers cut into ids at the powers of ``base``: floor(log(1 + |x|) / log(base)), with x's sign."""

    how: Literal["log"] = "log"
    base: float = Field(2.718281828459045, gt=1)
    buckets: int = Field(40, ge=2)
    """Buckets on either side of zero; larger numbers share the last."""


class Standard(_Strict):
    """A float: optionally log(1 + |x|) with x's sign, minus the training mean, over the deviation; missing is 0."""

    how: Literal["standard"] = "standard"
    log: bool = False
    clip: float | None = Field(10.0, gt=0)


Encoding = Annotated[Vocabulary | Hash | Quantile | LogBucket | Standard, Field(discriminator="how")]


class FromLog(_Strict):
    """A behaviour history made from the log itself: the user's earlier rows, strictly before the row's time."""

    column: str
    """The column whose values make the history, usually the item."""
    rows: Literal["clicks", "skips", "all"] = "clicks"
    """Rows with label 1, with label 0, or whatever their label."""

    @property
    def label(self) -> int | None:
        """The label of the rows that count; None: any."""
        return {"clicks": 1, "skips": 0, "all": None}[self.rows]


class Column(_Strict):
    """One feature.

    ``numeric`` with ``standard`` is a float; with ``quantile`` or ``log`` it becomes ids and is a categorical
    field to the model. ``categorical`` takes ``vocabulary`` or ``hash``. ``multi`` holds several values a row
    (a list column, or text split at ``separator``). ``sequence`` is a history: a list column, oldest first,
    or made ``from_log``. ``cross`` is what the columns named by ``of`` hold together, each combination a value.
    """

    name: str = Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=100)
    kind: Literal["numeric", "categorical", "multi", "sequence", "cross"]
    source: str | None = None
    """The column of the log, if it is called otherwise."""
    encode: Encoding | None = None
    dim: int | None = Field(None, ge=1)
    table: str | None = None
    """Columns of one table share a vocabulary and an embedding table; named after the column that owns it."""
    role: Role = "context"
    separator: str | None = Field(None, min_length=1)
    max_length: int = Field(50, ge=1, le=10_000)
    """Of a multi or sequence column; the last values of a sequence are kept, the first of a multi."""
    from_log: FromLog | None = None
    target: str | None = None
    """For a sequence: the column of the candidate that it is matched against."""
    of: tuple[str, ...] = ()
    """For a cross: two or more categorical columns; missing where one of them is."""

    @model_serializer(mode="wrap")
    def _written(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # What was fitted before there were crosses keeps its hash.
        tree = write(self)
        if not self.of:
            tree.pop("of", None)
        return tree

    @model_validator(mode="after")
    def _fits(self) -> Column:
        allowed = {
            "numeric": ("standard", "quantile", "log"),
            "categorical": ("vocabulary", "hash"),
            "multi": ("vocabulary", "hash"),
            "sequence": ("vocabulary", "hash"),
            "cross": ("vocabulary", "hash"),
        }[self.kind]
        if self.encode is not None and self.encode.how not in allowed:
            raise ValueError(
                f"a {self.kind} column can't be encoded by {self.encode.how!r}, only by {', '.join(allowed)}"
            )
        if self.from_log is not None and self.kind != "sequence":
            raise ValueError("from_log belongs to a sequence column")
        if self.target is not None and self.kind != "sequence":
            raise ValueError("target belongs to a sequence column")
        if self.of and self.kind != "cross":
            raise ValueError(f"of belongs to a cross; write kind: cross, or drop it from {self.name!r}")
        if self.kind == "cross":
            if len(set(self.of)) < 2 or len(set(self.of)) < len(self.of):
                raise ValueError(
                    f"cross {self.name!r} needs two or more columns, each once: of: [user_id, item_id]"
                )
            for key in ("source", "table", "separator"):
                if getattr(self, key) is not None:
                    raise ValueError(f"cross {self.name!r} reads the columns of its parts; drop its {key}")
        return self

    @property
    def column(self) -> str:
        """The column of the log that is read."""
        return self.from_log.column if self.from_log else (self.source or self.name)

    @property
    def encoding(self) -> Vocabulary | Hash | Quantile | LogBucket | Standard:
        """The encoding, or the kind's default."""
        return self.encode or (Standard() if self.kind == "numeric" else Vocabulary())

    @property
    def id_kind(self) -> IdKind | None:
        """Its kind to the model; None for a float."""
        if self.encoding.how == "standard":
            return None
        return self.kind if self.kind in ("multi", "sequence") else "categorical"


Task = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_.-]*$", max_length=100)]
"""A column that names metrics."""


class FeatureSpec(_Strict):
    """All columns of a log: the one definition that encodes the nightly batch and the single request.

    Example:
        >>> spec = FeatureSpec.model_validate({
        ...     "label": "click", "user": "user_id", "timestamp": "time",
        ...     "columns": [{"name": "user_id", "kind": "categorical", "role": "user"},
        ...                 {"name": "item_id", "kind": "categorical", "role": "item"},
        ...                 {"name": "history", "kind": "sequence", "table": "item_id", "target": "item_id",
        ...                  "from_log": {"column": "item_id"}}]})
        >>> spec.raw_columns
        ('click', 'user_id', 'time', 'item_id')
    """

    label: str
    tasks: tuple[Task, ...] = ()
    """Further labels, for models that predict several: columns of 0 and 1, null or NaN where unknown, which no loss
    and no metric counts. ``label`` stays what is served."""
    user: str | None = None
    """The column that tells users apart: per-user metrics, clusters of the statistics, histories."""
    item: str | None = None
    timestamp: str | None = None
    dim: int = Field(16, ge=1)
    """Embedding dimension of columns that name none."""
    columns: tuple[Column, ...] = Field(min_length=1)
    keep: tuple[str, ...] = ()
    """Columns carried unencoded into the encoded files, for slices and for checks, never a model's input."""

    @model_serializer(mode="wrap")
    def _written(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # What was fitted before there were tasks keeps its hash.
        tree = write(self)
        if not self.tasks:
            tree.pop("tasks", None)
        return tree

    @model_validator(mode="after")
    def _consistent(self) -> FeatureSpec:
        names = [c.name for c in self.columns]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise ValueError(f"columns appear twice: {', '.join(twice)}")
        by_name = {c.name: c for c in self.columns}
        for c in self.direct:
            if c.column == self.label and c.from_log is None:
                raise ValueError(
                    f"column {c.name!r} reads the label {self.label!r}: the model would see the answer"
                )
            if c.target is not None and c.target not in by_name:
                raise ValueError(f"sequence {c.name!r} has target {c.target!r}, which is no column")
            if c.table is not None and c.table != c.name:
                owner = by_name.get(c.table)
                if owner is None or owner.id_kind is None or owner.kind == "cross":
                    raise ValueError(
                        f"column {c.name!r} shares table {c.table!r}, which no id column is named after"
                    )
                if (owner.kind == "numeric") != (c.kind == "numeric" and c.id_kind is not None):
                    raise ValueError(
                        f"column {c.name!r} and its table {c.table!r}: one is cut into buckets, one isn't"
                    )
                if owner.table not in (None, owner.name):
                    raise ValueError(f"column {c.name!r} shares table {c.table!r}, which itself shares another")
                if c.encode is not None and c.encode != owner.encoding:
                    raise ValueError(f"column {c.name!r} and its table {c.table!r} are encoded differently")
                if c.dim is not None and c.dim != (owner.dim or self.dim):
                    raise ValueError(
                        f"column {c.name!r} has dim {c.dim}, its table {c.table!r} {owner.dim or self.dim}"
                    )
            if c.from_log is not None and (self.user is None or self.timestamp is None):
                raise ValueError(f"sequence {c.name!r} is made from the log and needs features.user and .timestamp")
        self._check_crosses(by_name)
        self._check_tasks()
        return self

    def _check_tasks(self) -> None:
        for position, task in enumerate(self.tasks):
            if task == self.label:
                raise ValueError(f"task {task!r} is the label already; drop it from tasks")
            if task in self.tasks[:position]:
                raise ValueError(f"task {task!r} stands there twice; drop one")
            if task in (self.user, self.item, self.timestamp):
                raise ValueError(f"task {task!r} is the user, item or timestamp; a task is a column of 0 and 1")
            for c in self.direct:
                if c.column == task:  # not even in a history: a conversion may come days after its row
                    raise ValueError(
                        f"column {c.name!r} reads the task {task!r}: the model would see the answer; drop one"
                    )

    def _check_crosses(self, by_name: dict[str, Column]) -> None:
        seen: dict[frozenset[str], str] = {}
        for c in self.crosses:
            for name in c.of:
                if name not in by_name:
                    remedy = nearest(name, [n for n, one in by_name.items() if one.kind == "categorical"])
                    raise ValueError(f"cross {c.name!r} is of {name!r}, which is no column. {remedy}")
                if by_name[name].kind != "categorical":
                    raise ValueError(
                        f"cross {c.name!r} is of {name!r}, which is {by_name[name].kind}; cross categorical columns"
                    )
            twin = seen.setdefault(frozenset(c.of), c.name)
            if twin != c.name:
                raise ValueError(f"crosses {twin!r} and {c.name!r} are of the same columns; drop one")

    @property
    def direct(self) -> tuple[Column, ...]:
        """The columns that read a column of the log; the others are crosses of these."""
        return tuple(c for c in self.columns if c.kind != "cross")

    @property
    def crosses(self) -> tuple[Column, ...]:
        """The columns that are crosses of others."""
        return tuple(c for c in self.columns if c.kind == "cross")

    @property
    def labels(self) -> dict[str, str]:
        """Every label's column in the log by its encoded column, the primary one first."""
        return {LABEL: self.label, **{task_label(task): task for task in self.tasks}}

    def owner(self, column: Column) -> Column:
        """Return the column whose table this one shares (itself, mostly)."""
        table = column.table or column.name
        return next(c for c in self.columns if c.name == table)

    def table_dim(self, column: Column) -> int:
        """Return the embedding dimension of the column's table."""
        return self.owner(column).dim or self.dim

    @property
    def raw_columns(self) -> tuple[str, ...]:
        """Every column of the log that is read, each once."""
        named = [
            *self.labels.values(),
            self.user,
            self.item,
            self.timestamp,
            *(c.column for c in self.direct),
            *self.keep,
        ]
        return tuple(dict.fromkeys(n for n in named if n is not None))

    @property
    def request_columns(self) -> tuple[str, ...]:
        """What a scoring request gives: raw columns of the features; a history made from the log under its name."""
        return tuple(dict.fromkeys(c.name if c.from_log else c.column for c in self.direct))
