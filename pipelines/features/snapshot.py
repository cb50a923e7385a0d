"""The embedded online feature store: a folder of Arrow files, mapped into memory and searched by hash."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
from pydantic import ValidationError

from ctr_models.errors import ArtifactError
from pipelines.features.files import atomic_directory, sha256_file
from pipelines.features.stored import FORMAT, HASH, KEY, Features, Rows, Stored, key_hash

MANIFEST = "manifest.json"
FILES = {"users": "users.arrow", "items": "items.arrow"}
_AGAIN = "run sluice materialize again"


def write_snapshot(
    features: Features, folder: Path, *, on_rows: Callable[[int], None] = lambda rows: None
) -> dict[str, Any]:
    """Write a snapshot, whole or not at all; servers that have an older one there open the new one by themselves.

    Args:
        features: what it shall hold. The same features give the same bytes.
        folder: where it shall stand.
        on_rows: told how many users or items have been written.

    Returns:
        The manifest.
    """
    with atomic_directory(folder) as aside:
        held = {"users": features.users, "items": features.items}
        files = {kind: FILES[kind] for kind, rows in held.items() if rows is not None}
        for kind, file in files.items():
            _write(held[kind], aside / file, on_rows)  # type: ignore[arg-type]
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "at": features.at,
            "fingerprint": features.fingerprint,
            "stored": features.stored.model_dump(mode="json"),
            "rows": {kind: len(rows) for kind, rows in held.items() if rows is not None},
            "files": {file: sha256_file(aside / file) for file in files.values()},
        }
        manifest["hash"] = _hash(manifest)
        (aside / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return manifest


def _write(rows: Rows, file: Path, on_rows: Callable[[int], None]) -> None:
    writer: pa.RecordBatchFileWriter | None = None
    try:
        for piece in rows.pieces():
            # The oldest types: 64-bit offsets, and every column one buffer that can be read where it lies.
            table = piece.rechunk().to_arrow(compat_level=pl.CompatLevel.oldest()).combine_chunks()
            writer = writer or pa.ipc.new_file(str(file), table.schema)
            writer.write_table(table)
            on_rows(len(piece))
    finally:
        if writer is not None:
            writer.close()


class Snapshot:
    """An opened snapshot. Nothing but the pages that are looked at is in memory.

    Args:
        manifest: as it was written.
        tables: users and items.
    """

    def __init__(self, manifest: dict[str, Any], tables: dict[str, _Table]) -> None:
        self.manifest, self._tables = manifest, tables
        self.stored = Stored.model_validate(manifest["stored"])

    @property
    def version(self) -> str:
        """The beginning of the hash over all that it holds."""
        return str(self.manifest["hash"])[:12]

    @classmethod
    def open(cls, folder: Path) -> Snapshot:
        """Open a snapshot and check the hash of every file.

        It stays readable when another takes its place.

        Raises:
            ArtifactError: naming the file that is missing, damaged or of another version.

        Example:
            >>> import tempfile
            >>> rows = pl.DataFrame({KEY: ["a"], "price": [2.5]}).with_columns(pl.Series(HASH, key_hash(["a"])))
            >>> stored = Stored(user=None, item={"key": "ad", "type": "text", "columns": ["price"]}, histories={})
            >>> folder = Path(tempfile.mkdtemp()) / "online"
            >>> _ = write_snapshot(Features(stored, None, Rows(rows, {}), None, ""), folder)
            >>> Snapshot.open(folder).find("items", ["a", "b"])
            [{'price': 2.5}, None]
        """
        folder = Path(folder)
        with _directory(folder) as directory:
            manifest = _read_manifest(folder, directory)
            tables = {}
            for kind, file in FILES.items():
                if file in manifest["files"]:
                    tables[kind] = _Table(_map(folder, directory, file, manifest["files"][file]))
            return cls(manifest, tables)

    def find(self, kind: str, ids: Sequence[str]) -> list[dict[str, Any] | None]:
        """Return the stored values of ``users`` or ``items``: None for whom there are none; nulls are left out."""
        table = self._tables.get(kind)
        return table.find(ids) if table is not None and len(ids) else [None] * len(ids)


class _Table:
    """Rows sorted by hash, in batches."""

    def __init__(self, buffer: pa.Buffer) -> None:
        reader = pa.ipc.open_file(buffer)
        batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        self.batches = [batch for batch in batches if batch.num_rows]
        self.hashes = [batch.column(HASH).to_numpy() for batch in self.batches]
        self.first = np.array([hashes[0] for hashes in self.hashes], dtype=np.uint64)

    def find(self, ids: Sequence[str]) -> list[dict[str, Any] | None]:
        out: list[dict[str, Any] | None] = [None] * len(ids)
        wanted = key_hash(ids)
        places = np.searchsorted(self.first, wanted, side="right") - 1
        for place in np.unique(places[places >= 0]).tolist():
            asked = np.flatnonzero(places == place)
            hashes = self.hashes[place]
            rows = np.searchsorted(hashes, wanted[asked])
            # Ids may share a hash: their rows lie side by side, and each pass looks at the next of them.
            while len(asked):
                same = rows < len(hashes)
                same[same] = hashes[rows[same]] == wanted[asked[same]]
                asked, rows = asked[same], rows[same]
                values = self._rows(place, rows)
                other = []
                for i, one in enumerate(values):
                    if one.pop(KEY) == ids[asked[i]]:
                        out[asked[i]] = one
                    else:
                        other.append(i)
                asked, rows = asked[other], rows[other] + 1
        return out

    def _rows(self, place: int, rows: np.ndarray) -> list[dict[str, Any]]:
        taken = self.batches[place].take(pa.array(rows))
        columns = {name: taken.column(name).to_pylist() for name in taken.schema.names if name != HASH}
        return [{n: v[i] for n, v in columns.items() if v[i] is not None} for i in range(len(rows))]


@contextmanager
def _directory(folder: Path) -> Iterator[int]:
    """Hold a folder by itself, not by its name, which another may have taken by the next look."""
    try:
        directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        problem = f"no snapshot of features here ({error.strerror})"
        raise ArtifactError(problem, where=str(folder), remedy="sluice materialize writes one") from None
    try:
        yield directory
    finally:
        os.close(directory)


def _map(folder: Path, directory: int, name: str, digest: str | None = None) -> pa.Buffer:
    """Map a file into memory; check its hash, if one is given."""
    try:
        handle = os.open(name, os.O_RDONLY, dir_fd=directory)
        try:
            content = mmap.mmap(handle, 0, prot=mmap.PROT_READ)
        finally:
            os.close(handle)
    except (OSError, ValueError) as error:  # an empty file can't be mapped
        problem = "the file is missing" if isinstance(error, FileNotFoundError) else f"can't be read ({error})"
        raise ArtifactError(problem, where=str(folder / name), remedy=_AGAIN) from None
    if digest is not None and (found := hashlib.sha256(content).hexdigest()) != digest:
        raise ArtifactError(f"expected SHA-256 {digest}, found {found}", where=str(folder / name), remedy=_AGAIN)
    return pa.py_buffer(content)


def _read_manifest(folder: Path, directory: int) -> dict[str, Any]:
    where = str(folder / MANIFEST)
    try:
        manifest = json.loads(_map(folder, directory, MANIFEST).to_pybytes())
        found, digest = manifest["format"], manifest["hash"]
        if found == FORMAT and digest == _hash(manifest):
            Stored.model_validate(manifest["stored"])
            return manifest
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        text = " ".join(str(error).split())
        raise ArtifactError(f"not a snapshot's manifest ({text})", where=where, remedy=_AGAIN) from None
    if found != FORMAT:
        problem = f"format {found!r}, this version of sluice reads {FORMAT}"
        raise ArtifactError(problem, where=where, remedy=_AGAIN)
    raise ArtifactError("its hash is not that of its content", where=where, remedy=_AGAIN)


def _hash(manifest: dict[str, Any]) -> str:
    content = {k: v for k, v in manifest.items() if k != "hash"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
