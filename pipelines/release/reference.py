"""The reference of a Bundle: how features and scores were spread, to tell how far live traffic is off."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from ctr_models.batch import EncodedRows
from pipelines.features.encoders import FIRST, MISSING, UNKNOWN
from pipelines.release.part import Part

GROUPS = 10
FLOOR = 1e-4
"""A share below this counts as this: what was never seen would be infinitely far away."""

Shares = Annotated[list[Annotated[float, Field(ge=0, le=1)]], Field(min_length=1)]


class Spread(BaseModel):
    """How values fall into groups.

    Args:
        edges: rising; a value equal to an edge is in the group above it.
        shares: of each group, one more than edges.

    Example:
        >>> spread = Spread.of(np.array([1.0, 2.0, 3.0, 4.0]), np.array([3.0]))
        >>> spread.shares, spread.counts(np.array([5.0, 6.0, 0.0])).tolist()
        ([0.5, 0.5], [1, 2])
        >>> spread.psi(np.array([50, 50])), round(spread.psi(np.array([80, 20])), 3)
        (0.0, 0.416)
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    edges: list[float]
    shares: Shares

    @model_validator(mode="after")
    def _fits(self) -> Spread:
        if len(self.shares) != len(self.edges) + 1 or any(np.diff(self.edges) <= 0):
            raise ValueError("edges must rise, and shares be one more")
        return self

    @classmethod
    def of(cls, values: np.ndarray, edges: np.ndarray) -> Spread:
        """Measure values, (N,), at least one."""
        edges = np.unique(edges.astype(np.float64))
        counts = np.bincount(np.searchsorted(edges, values, side="right"), minlength=len(edges) + 1)
        return cls(edges=edges.tolist(), shares=(counts / len(values)).tolist())

    def counts(self, values: np.ndarray) -> np.ndarray:
        """Return how many values fall into each group, (G,) int64."""
        groups = np.searchsorted(np.array(self.edges, dtype=values.dtype), values, side="right")
        return np.bincount(groups, minlength=len(self.shares))

    def psi(self, counts: np.ndarray) -> float:
        """Return the population stability index of counts, (G,): :math:`\\sum (p - q) \\ln (p / q)`.

        Under 0.1 little has changed, above 0.25 much has.
        """
        p = np.maximum(counts / counts.sum(), FLOOR)
        q = np.maximum(self.shares, FLOOR)
        return float(((p - q) * np.log(p / q)).sum())


class Reference(Part):
    """What a model saw when it was trained, and the scores that it gave rows which it had not seen.

    Args:
        rows: that were looked at.
        fields: the encoded values of each field; ids of all rows together where a field has several.
        scores: probabilities.

    Example:
        >>> from ctr_models import Schema, example_rows
        >>> rows = example_rows(Schema.of({"ad": 9}, dense=["price"]), rows=100)
        >>> reference = Reference.of(rows, np.linspace(0, 1, 100))
        >>> sorted(reference.fields), len(reference.scores.shares)
        (['ad', 'price'], 10)
    """

    what = "the reference"
    rows: int = Field(ge=1)
    fields: dict[str, Spread]
    scores: Spread

    @classmethod
    def of(cls, rows: EncodedRows, scores: np.ndarray) -> Reference:
        """Measure encoded rows, at least one, and scores, (N,)."""
        fields = {}
        for name, values in columns(rows).items():
            ids = values.dtype.kind == "i"
            known = values[values >= FIRST] if ids else values
            inner = _quantiles(known) if len(known) else np.empty(0)
            fields[name] = Spread.of(values, np.concatenate([[UNKNOWN, FIRST], inner]) if ids else inner)
        return cls(rows=len(rows), fields=fields, scores=Spread.of(scores, _quantiles(scores)))


def columns(rows: EncodedRows) -> Mapping[str, np.ndarray]:
    """Return each field's values: numbers, float32, or ids, int32; a row without ids counts as a missing one."""
    found: dict[str, np.ndarray] = {f.name: rows.dense[:, i] for i, f in enumerate(rows.schema.dense)}
    singles = [f.name for f in rows.schema.sparse if f.kind == "categorical"]
    found.update(zip(singles, rows.single, strict=True))
    for name, ragged in rows.ragged.items():
        empty = int(np.count_nonzero(np.diff(ragged.offsets) == 0))
        found[name] = np.concatenate([np.full(empty, MISSING, dtype=np.int32), ragged.values[: ragged.offsets[-1]]])
    return found


def _quantiles(values: np.ndarray) -> np.ndarray:
    """Return the inner edges of groups of equal size, fewer where values repeat."""
    cuts = np.quantile(values, np.linspace(0, 1, GROUPS + 1)[1:-1], method="higher")
    return np.unique(cuts)
