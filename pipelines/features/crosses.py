"""Crosses: what several columns of a row hold together, as one value that a vocabulary can count.

The value of a cross is a 64-bit key of its parts' canonical values, not of their ids: so it is fitted in the same
scan as they are, states can be merged, and a part's vocabulary may grow or shrink without touching it. Two of n
combinations share a key by chance with probability n^2 / 2^65, less than one in a thousand for a hundred million.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from threading import Lock
from typing import NamedTuple

import numpy as np
import polars as pl

from ctr_models.errors import DataError
from pipelines.features.canonical import Type, canonical_series
from pipelines.features.columns import Coded, RawColumn
from pipelines.features.hashing import combine, stable_hash
from pipelines.features.spec import Column, FeatureSpec

KEYS: Type = "integer"
"""Canonical type of the keys."""


class Hashed(NamedTuple):
    """The values of a part: their hashes (N,) uint64, anything where missing, and which are there, (N,) bool."""

    hashes: np.ndarray
    known: np.ndarray

    @classmethod
    def of(cls, values: pl.Series) -> Hashed:
        """Hash canonical values."""
        known = values.is_not_null().to_numpy()
        if known.all():
            return cls(stable_hash(values), known)
        hashes = np.zeros(len(values), dtype=np.uint64)
        hashes[known] = stable_hash(values.drop_nulls())
        return cls(hashes, known)

    def take(self, index: np.ndarray) -> Hashed:
        """Return the values at some places."""
        return Hashed(self.hashes[index], self.known[index])


def cross_keys(parts: Iterable[Hashed]) -> pl.Series:
    """Return the key of each row's combination, (N,) Int64; null where a part is missing.

    Example:
        >>> user, hour = Hashed.of(pl.Series(["a", "a", None])), Hashed.of(pl.Series([7, 8, 7]))
        >>> keys = cross_keys([user, hour])
        >>> keys.null_count(), keys.n_unique()
        (1, 3)
    """
    parts = list(parts)
    known = np.logical_and.reduce([p.known for p in parts])
    keys = pl.Series(combine([p.hashes for p in parts]).view(np.int64))
    return keys if known.all() else keys.set(pl.Series(~known), None)


class Crosser:
    """Makes the keys of every cross of a spec, chunk by chunk; the texts of a dictionary are hashed once.

    Args:
        spec: the definition.
        types: canonical type of each raw column.
        source: the file that messages name.
    """

    def __init__(self, spec: FeatureSpec, types: Mapping[str, Type], source: str) -> None:
        self._of = {c.name: c.of for c in spec.crosses}
        by_name = {c.name: c for c in spec.columns}
        self._parts = {name: (by_name[name].column, part_type(spec, by_name[name], types)) for name in self.parts}
        self._source = source
        self._dictionaries: dict[str, Hashed] = {}
        self._lock = Lock()

    @property
    def parts(self) -> list[str]:
        """The columns that are crossed, each once."""
        return list(dict.fromkeys(name for of in self._of.values() for name in of))

    def keys(self, chunk: Mapping[str, RawColumn]) -> Iterator[tuple[str, pl.Series]]:
        """Yield each cross and its keys, (N,) Int64, null where a part is missing.

        Args:
            chunk: the raw columns; a coded one must have the same values in every chunk.

        Raises:
            DataError: a value is not of its column's type.
        """
        parts = {name: self._hashed(name, chunk) for name in self._parts}
        for name, of in self._of.items():  # one at a time: many crosses of a chunk would fill the memory
            yield name, cross_keys(parts[part] for part in of)

    def _hashed(self, part: str, chunk: Mapping[str, RawColumn]) -> Hashed:
        raw, kind = self._parts[part]
        column = chunk[raw]
        try:
            if not isinstance(column, Coded):
                return Hashed.of(canonical_series(column, kind))
            with self._lock:
                if part not in self._dictionaries:
                    # Null comes last, where an index of -1 finds it.
                    null = pl.Series(column.values.name, [None], dtype=column.values.dtype)
                    self._dictionaries[part] = Hashed.of(canonical_series(pl.concat([column.values, null]), kind))
        except ValueError as error:
            raise DataError(
                str(error), where=f"{self._source}: column {raw}", remedy="write one type of value in a column"
            ) from None
        return self._dictionaries[part].take(column.index)


def part_type(spec: FeatureSpec, part: Column, types: Mapping[str, Type]) -> Type:
    """Return the canonical type of a crossed column: that of the table it looks its values up in."""
    return types[spec.owner(part).column]
