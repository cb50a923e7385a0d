"""The FeatureState: a FeatureSpec fitted on data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from ctr_models.errors import ArtifactError, DataError
from ctr_models.schema import DenseField, IdField, Schema
from pipelines.features.canonical import DTYPES, Type
from pipelines.features.encoders import FIRST, Lookup, hash_ids, log_ids, quantile_ids
from pipelines.features.files import atomic_directory, sha256_file
from pipelines.features.spec import Column, Encoding, FeatureSpec, Hash, LogBucket, Quantile, Vocabulary
from pipelines.features.summaries import Moments, Quantiles

FORMAT = 1
_MANIFEST = "state.json"
_AGAIN = "copy it again from where it was made, or fit again"


@dataclass(frozen=True, eq=False)
class Table:
    """What one embedding table stands for.

    Args:
        name: of the column that owns it.
        type: canonical type of the values that are looked up in it.
        encoding: of its owner.
        values: distinct values seen in training, or, of a hash and of buckets, the ids seen; those with an id
            first, by id, the others by falling count, then value.
        counts: (K,) int64, occurrences in training.
        ids: (K,) int32; 0 for values without an id.
        missing: occurrences of no value.
        quantiles: summary of a ``quantile`` column.
        edges: its cuts, once they are fixed.
        places: (n,) int32, the row of each of the first n ids, once values were dropped; later ids have the rows
            that follow. None: an id is its row.
    """

    name: str
    type: Type
    encoding: Encoding
    values: pl.Series
    counts: np.ndarray
    ids: np.ndarray
    missing: int = 0
    quantiles: Quantiles = field(default_factory=Quantiles.empty)
    edges: np.ndarray | None = None
    places: np.ndarray | None = None

    @property
    def rows(self) -> int:
        """Rows of the embedding table."""
        if self.places is None:
            return self._size
        return int(self.places.max()) + 1 + self._size - len(self.places)

    @property
    def _size(self) -> int:
        """The number of ids."""
        encoding = self.encoding
        if isinstance(encoding, Vocabulary):
            return FIRST + int(np.count_nonzero(self.ids))
        if isinstance(encoding, LogBucket):
            return FIRST + 2 * encoding.buckets + 1
        assert isinstance(encoding, Hash | Quantile)
        return FIRST + encoding.buckets

    def row_of(self, ids: np.ndarray) -> np.ndarray:
        """Return the rows of ids, (N,) int32."""
        if self.places is None:
            return ids
        listed = len(self.places)
        later = ids - listed + int(self.places.max()) + 1
        return np.where(ids < listed, self.places[np.minimum(ids, listed - 1)], later).astype(np.int32)

    def moves(self, dropped: np.ndarray) -> np.ndarray:
        """Return the new row of each row when some are dropped: they share row 2; rows 0 and 1 stay.

        Args:
            dropped: (rows,) bool.

        Returns:
            (rows,) int32.
        """
        own = ~dropped
        own[:FIRST] = True
        if own.all():
            return np.arange(self.rows, dtype=np.int32)
        moves = np.full(self.rows, FIRST, dtype=np.int32)
        moves[:FIRST] = np.arange(FIRST)
        moves[np.flatnonzero(own)[FIRST:]] = np.arange(FIRST + 1, FIRST + 1 + int(own[FIRST:].sum()))
        return moves

    def dropping(self, dropped: np.ndarray) -> Table:
        """Return the table without the rows ``dropped``, (rows,) bool; their ids share row 2."""
        if not dropped[FIRST:].any():
            return self
        return replace(self, places=self.moves(dropped)[self.row_of(np.arange(self._size, dtype=np.int32))])

    def known(self) -> tuple[pl.Series, np.ndarray]:
        """Return the values that have an id, and their rows, (K,) int32."""
        size = int(np.count_nonzero(self.ids))
        return self.values[:size], self.row_of(self.ids[:size])

    def indexer(self) -> Callable[[pl.Series], np.ndarray]:
        """Return the function from canonical values to rows, (N,) int32; a vocabulary's index is built here."""
        encoding = self.encoding
        if isinstance(encoding, Vocabulary):
            return Lookup(*self.known()).ids
        assert isinstance(encoding, Hash)

        def hashed(values: pl.Series) -> np.ndarray:
            out = np.zeros(len(values), dtype=np.int32)
            known = values.is_not_null().to_numpy()
            out[known] = hash_ids(values.drop_nulls(), encoding.buckets, encoding.salt)
            return self.row_of(out)

        return hashed

    def bucket_ids(self, x: np.ndarray) -> np.ndarray:
        """Return the rows of numbers (N,) float64 cut into buckets."""
        if isinstance(self.encoding, LogBucket):
            return self.row_of(log_ids(x, self.encoding))
        assert self.edges is not None
        return self.row_of(quantile_ids(x, self.edges))

    def merge(self, other: Table) -> Table:
        """Add the counts of both; ids stay as they are here."""
        if self.type != other.type:
            raise DataError(
                f"its values are {other.type} in one log and {self.type} in the other",
                where=f"column {self.name}",
                remedy="write the column with one type in every log",
            )
        quantiles = self.quantiles.merge(other.quantiles)
        if isinstance(self.encoding, Quantile):
            return replace(self, missing=self.missing + other.missing, quantiles=quantiles)._bucketed()
        mine = pl.DataFrame({"value": self.values, "count": self.counts, "id": self.ids})
        # The ids of a vocabulary are its own; those of a hash and of buckets are everyone's.
        their_ids = np.zeros_like(other.ids) if isinstance(self.encoding, Vocabulary) else other.ids
        theirs = pl.DataFrame({"value": other.values, "count": other.counts, "id": their_ids})
        both = pl.concat([mine, theirs]).group_by("value").agg(pl.col("count").sum(), pl.col("id").max())
        return replace(self.counted(both), missing=self.missing + other.missing)

    def _bucketed(self) -> Table:
        """Count a quantile column's buckets anew, once its edges are fixed."""
        if self.edges is None:
            return self
        seen = quantile_ids(self.quantiles.values, self.edges)
        counts = np.bincount(seen, weights=self.quantiles.weights, minlength=self._size).astype(np.int64)
        ids = np.flatnonzero(counts)
        return replace(self, values=pl.Series(ids), counts=counts[ids], ids=ids.astype(np.int32))

    def counted(self, frame: pl.DataFrame) -> Table:
        """Return the table with other values: columns value, count and id (0 for none), in any order."""
        frame = frame.select("value", pl.col("count").cast(pl.Int64), pl.col("id").cast(pl.Int32))
        known = frame.filter(pl.col("id") > 0).sort("id")
        new = frame.filter(pl.col("id") == 0)
        often = new.filter(pl.col("count") > 1).sort(["count", "value"], descending=[True, False])
        # Most values of a log are seen once. They need no places, only their order, which is far cheaper.
        once = new.filter(pl.col("count") == 1)["value"].sort().to_frame()
        once = once.with_columns(pl.lit(1, pl.Int64).alias("count"), pl.lit(0, pl.Int32).alias("id"))
        frame = pl.concat([known, often, once])
        return replace(
            self, values=frame["value"], counts=frame["count"].to_numpy(), ids=frame["id"].to_numpy().copy()
        )

    def assigned(self) -> Table:
        """Give ids to values that deserve one and have none, and fix the edges if they aren't fixed."""
        if isinstance(self.encoding, Quantile) and self.edges is None:
            return replace(self, edges=self.quantiles.edges(self.encoding.buckets))._bucketed()
        if not isinstance(self.encoding, Vocabulary):
            return self
        have = int(np.count_nonzero(self.ids))
        new = self.counts[have:] >= self.encoding.min_count  # falling counts: a stretch at the front
        room = len(new) if self.encoding.max_size is None else max(0, self.encoding.max_size - have)
        take = min(int(new.sum()), room)
        ids = self.ids.copy()
        ids[have : have + take] = np.arange(FIRST + have, FIRST + have + take, dtype=np.int32)
        return replace(self, ids=ids)

    def occurrences(self) -> np.ndarray:
        """Return how often each row was seen in training, (rows,) int64."""
        counts = np.zeros(self.rows, dtype=np.int64)
        counts[0] = self.missing
        vocabulary = isinstance(self.encoding, Vocabulary)
        ids = np.where(self.ids == 0, 1, self.ids) if vocabulary else self.values.to_numpy()
        np.add.at(counts, self.row_of(ids), self.counts)
        return counts

    def digest(self) -> str:
        """Return a hash of everything the table holds."""
        h = hashlib.sha256()
        h.update(json.dumps([self.name, self.type, self.encoding.model_dump(mode="json"), self.missing]).encode())
        if self.values.dtype == pl.String:
            array = self.values.rechunk().to_arrow().cast(pa.large_string())
            h.update(pc.binary_length(array).to_numpy(zero_copy_only=False).tobytes())
            text = array.buffers()[2]
            start, stop = array.offset, array.offset + len(array)
            offsets = np.frombuffer(array.buffers()[1], dtype=np.int64)
            h.update(b"" if text is None else memoryview(text)[offsets[start] : offsets[stop]])
        else:
            h.update(self.values.to_numpy().tobytes())
        edges = np.empty(0) if self.edges is None else self.edges
        for array in (self.counts, self.ids, self.quantiles.values, self.quantiles.weights, edges):
            h.update(len(array).to_bytes(8, "little") + np.ascontiguousarray(array).tobytes())
        if self.places is not None:
            h.update(self.places.tobytes())
        return h.hexdigest()


@dataclass(frozen=True, eq=False)
class FeatureState:
    """A FeatureSpec fitted on data: vocabularies, edges, statistics. Immutable.

    Args:
        spec: the definition.
        types: canonical type of each raw column that is encoded, the user's included.
        tables: by name.
        moments: of the ``standard`` columns, by name.
        rows: rows it was fitted on.
        fitted: whether ids are given; False only between :meth:`count` and :meth:`assign`.

    Example:
        >>> spec = FeatureSpec.model_validate({"label": "click", "columns": [
        ...     {"name": "ad", "kind": "categorical"}, {"name": "price", "kind": "numeric"}]})
        >>> log = pl.LazyFrame({"click": [0, 1, 0], "ad": ["a", "b", "a"], "price": [1.0, 2.0, 3.0]})
        >>> state = FeatureState.fit(spec, log, source="log")
        >>> state.counts("ad").tolist(), state.schema().sparse[0].rows
        ([0, 0, 2, 1], 4)
    """

    spec: FeatureSpec
    types: dict[str, Type]
    tables: dict[str, Table]
    moments: dict[str, Moments]
    rows: int
    fitted: bool = False

    @classmethod
    def fit(cls, spec: FeatureSpec, frame: pl.LazyFrame, *, source: str) -> FeatureState:
        """Fit a spec on raw rows.

        Args:
            spec: the definition.
            frame: raw rows, read once, in batches.
            source: the file that messages name.

        Raises:
            DataError: a column is missing or of a wrong type.
        """
        return cls.count(spec, frame, source=source).assign()

    @classmethod
    def count(cls, spec: FeatureSpec, frame: pl.LazyFrame, *, source: str) -> FeatureState:
        """Summarise raw rows without giving ids, to be merged with other parts and then :meth:`assign`\\ ed.

        Counting parts, merging and assigning is the same as fitting the whole.
        """
        from pipelines.features.fit import count

        return count(spec, frame, source=source)

    def assign(self) -> FeatureState:
        """Give ids to the values that deserve one and have none; old ids keep their numbers."""
        return replace(self, tables={name: t.assigned() for name, t in self.tables.items()}, fitted=True)

    def merge(self, other: FeatureState) -> FeatureState:
        """Return the state of both logs: counts and statistics add up, old ids keep their numbers.

        New values get the next ids, in the order of falling count, then value. Neither state having ids yet,
        the merged one has none.

        Args:
            other: of the same spec. Its ids, if any, are dropped.

        Raises:
            ArtifactError: the specs differ.
        """
        if self.spec != other.spec:
            raise ArtifactError(
                "the states to be merged are of different FeatureSpecs",
                where="FeatureState.merge",
                remedy="fit both parts with one spec",
            )
        differing = [n for n in self.types if self.types[n] != other.types.get(n)]
        if differing:
            name = differing[0]
            raise DataError(
                f"holds {other.types.get(name)} values in one log and {self.types[name]} values in the other",
                where=f"column {name}",
                remedy="write the column with one type in every log",
            )
        merged = FeatureState(
            self.spec,
            self.types,
            {name: table.merge(other.tables[name]) for name, table in self.tables.items()},
            {name: moments.merge(other.moments[name]) for name, moments in self.moments.items()},
            self.rows + other.rows,
        )
        return merged.assign() if self.fitted else merged

    @cached_property
    def hash(self) -> str:
        """SHA-256 of all it holds."""
        content = {**self._json(), "tables": {name: t.digest() for name, t in sorted(self.tables.items())}}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def table(self, column: Column) -> Table:
        """Return the table that a column looks its values up in."""
        return self.tables[column.table or column.name]

    def schema(self) -> Schema:
        """Return the model's side: fields, table sizes, dimensions."""
        dense: list[DenseField] = []
        ids: dict[bool, list[IdField]] = {False: [], True: []}
        for c in self.spec.columns:
            dim = (c.dim or self.spec.dim) if c.id_kind is None else self.spec.table_dim(c)
            if c.id_kind is None:
                dense.append(DenseField(name=c.name, dim=dim, role=c.role))
                continue
            single = c.id_kind == "categorical"
            ids[c.id_kind == "sequence"].append(
                IdField(
                    name=c.name,
                    rows=self.table(c).rows,
                    dim=dim,
                    kind=c.id_kind,
                    table=c.table or c.name,
                    role=c.role,
                    target=c.target,
                    max_length=1 if single else c.max_length,
                    of=c.of,
                )
            )
        return Schema(
            dense=tuple(dense), sparse=tuple(ids[False]), sequences=tuple(ids[True]), tasks=self.spec.tasks
        )

    def dropping(self, dropped: Mapping[str, np.ndarray]) -> FeatureState:
        """Return the state in which chosen values no longer take rows: in each table they share row 2.

        A missing value stays row 0 and a value outside the vocabulary row 1. Values that are seen first in later
        logs get rows of their own by :meth:`merge`; a dropped one stays dropped.

        Args:
            dropped: by table, (rows,) bool; tables that are not named stay as they are.

        Example:
            >>> ad = {"name": "ad", "kind": "categorical"}
            >>> spec = FeatureSpec.model_validate({"label": "y", "columns": [ad]})
            >>> log = pl.LazyFrame({"y": [0, 1, 0, 1], "ad": ["a", "b", "a", "c"]})
            >>> state = FeatureState.fit(spec, log, source="log")
            >>> state.counts("ad").tolist()
            [0, 0, 2, 1, 1]
            >>> small = state.dropping({"ad": np.array([False, False, True, False, True])})
            >>> values, rows = small.tables["ad"].known()
            >>> small.counts("ad").tolist(), dict(zip(values, rows.tolist(), strict=True))
            ([0, 0, 3, 1], {'a': 2, 'b': 3, 'c': 2})
        """
        tables = {n: t.dropping(dropped[n]) if n in dropped else t for n, t in self.tables.items()}
        return replace(self, tables=tables)

    def counts(self, table: str) -> np.ndarray:
        """Return how often each row of a table was seen in training, (rows,) int64."""
        return self.tables[table].occurrences()

    def save(self, directory: Path) -> None:
        """Write the state: ``state.json`` and a Parquet file a table, whole or not at all."""
        with atomic_directory(directory) as aside:
            files = {}
            for position, (name, table) in enumerate(sorted(self.tables.items())):
                file = f"table-{position:04d}.parquet"
                frame = pl.DataFrame(
                    {"value": table.values, "count": table.counts, "id": pl.Series(table.ids, dtype=pl.Int32)}
                ).with_columns(pl.when(pl.col("id") > 0).then("id").alias("id"))
                frame.write_parquet(aside / file, compression="lz4", statistics=False)
                files[name] = {"file": file, "sha256": sha256_file(aside / file)}
                if isinstance(table.encoding, Quantile):
                    file = f"quantiles-{position:04d}.parquet"
                    summary = pl.DataFrame({"value": table.quantiles.values, "weight": table.quantiles.weights})
                    summary.write_parquet(aside / file, compression="lz4", statistics=False)
                    files[name] |= {"quantiles": file, "quantiles_sha256": sha256_file(aside / file)}
                if table.places is not None:
                    file = f"places-{position:04d}.parquet"
                    pl.DataFrame({"row": table.places}).write_parquet(aside / file, compression="lz4")
                    files[name] |= {"places": file, "places_sha256": sha256_file(aside / file)}
            content = {"format": FORMAT, "hash": self.hash, **self._json(), "files": files}
            (aside / _MANIFEST).write_text(json.dumps(content, indent=1), encoding="utf-8")

    @classmethod
    def load(cls, directory: Path) -> FeatureState:
        """Read a state and verify it.

        Raises:
            ArtifactError: naming the file that is missing, changed or of another version.
        """
        path = Path(directory) / _MANIFEST
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ArtifactError("no FeatureState", where=str(path), remedy="sluice features fits one") from None
        except (ValueError, OSError) as error:
            raise ArtifactError(f"can't be read ({error})", where=str(path), remedy=_AGAIN) from None
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            found = content.get("format") if isinstance(content, dict) else None
            raise ArtifactError(
                f"format {found!r}, this version of sluice reads {FORMAT}",
                where=str(path),
                remedy="fit again, or use the version that wrote it",
            )
        try:
            state = cls._from_json(content, Path(directory))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArtifactError(
                f"not a FeatureState's content ({type(error).__name__}: {' '.join(str(error).split())[:200]})",
                where=str(path),
                remedy=_AGAIN,
            ) from None
        if state.hash != content.get("hash"):
            raise ArtifactError(
                f"its hash is {state.hash[:16]}, {str(content.get('hash'))[:16]} was written",
                where=str(path),
                remedy=_AGAIN,
            )
        return state

    def _json(self) -> dict[str, Any]:
        return {
            "spec": self.spec.model_dump(mode="json"),
            "types": self.types,
            "rows": self.rows,
            "fitted": self.fitted,
            "moments": {n: [m.count, m.mean, m.squares] for n, m in self.moments.items()},
            "tables": {
                n: {
                    "type": t.type,
                    "missing": t.missing,
                    "edges": None if t.edges is None else [float(e) for e in t.edges],
                }
                for n, t in self.tables.items()
            },
        }

    @classmethod
    def _from_json(cls, content: dict[str, Any], directory: Path) -> FeatureState:
        spec = FeatureSpec.model_validate(content["spec"])
        by_name = {c.name: c for c in spec.columns}
        tables = {}
        for name, one in content["tables"].items():
            entry = content["files"][name]
            frame = _verified(directory / entry["file"], entry["sha256"])
            encoding = by_name[name].encoding
            quantiles = Quantiles.empty()
            if isinstance(encoding, Quantile):
                summary = _verified(directory / entry["quantiles"], entry["quantiles_sha256"])
                quantiles = Quantiles(summary["value"].to_numpy(), summary["weight"].to_numpy())
            places = None
            if "places" in entry:
                places = _verified(directory / entry["places"], entry["places_sha256"])["row"].to_numpy()
            dtype = DTYPES[one["type"]] if isinstance(encoding, Vocabulary) else pl.Int64
            tables[name] = Table(
                name,
                one["type"],
                encoding,
                frame["value"].cast(dtype),
                frame["count"].to_numpy(),
                frame["id"].fill_null(0).to_numpy(),
                one["missing"],
                quantiles,
                None if one["edges"] is None else np.array(one["edges"], dtype=np.float64),
                places,
            )
        moments = {n: Moments(*m) for n, m in content["moments"].items()}
        return cls(spec, content["types"], tables, moments, content["rows"], content["fitted"])


def _verified(path: Path, digest: str) -> pl.DataFrame:
    if not path.is_file():
        raise ArtifactError("the file is missing", where=str(path), remedy=_AGAIN)
    found = sha256_file(path)
    if found != digest:
        raise ArtifactError(f"SHA-256 expected {digest[:16]}, found {found[:16]}", where=str(path), remedy=_AGAIN)
    try:
        return pl.read_parquet(path)
    except pl.exceptions.PolarsError as error:
        raise ArtifactError(f"can't be read ({error})", where=str(path), remedy=_AGAIN) from None
