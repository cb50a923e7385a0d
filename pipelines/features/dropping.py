"""Encoded features from which chosen values have been dropped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.features.files import atomic_directory
from pipelines.features.fit import CHUNK
from pipelines.features.prepare import MANIFEST, EncodedData, split_entry
from pipelines.features.split import SPLITS
from pipelines.features.stage import open_writer


def drop_values(data: EncodedData, dropped: Mapping[str, np.ndarray], folder: Path) -> EncodedData:
    """Write the features anew with smaller tables: in each, the dropped values share row 2.

    Only ids change. Every row, its label and its number stay, in their order.

    Args:
        data: encoded features.
        dropped: by table, (rows,) bool; see :meth:`FeatureState.dropping`.
        folder: where the result shall stand, whole or absent.

    Returns:
        The encoded features with their state.
    """
    state = data.state.dropping(dropped)
    moves = {name: data.state.tables[name].moves(one) for name, one in dropped.items()}
    fields = {f.name: moves[f.table] for f in (*data.schema.sparse, *data.schema.sequences) if f.table in moves}
    with atomic_directory(folder) as aside:
        state.save(aside / "state")
        for split in SPLITS:
            for file in data.files(split):
                _rewrite(file, aside / split / file.name, fields)
        manifest = {
            **data.manifest,
            "key": hashlib.sha256(f"{data.manifest['key']} {state.hash}".encode()).hexdigest()[:32],
            "state": state.hash,
            "schema": state.schema().model_dump(mode="json"),
            "splits": {split: split_entry(aside, split, data.rows(split)) for split in SPLITS},
        }
        (aside / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    return EncodedData.open(folder)


def _rewrite(file: Path, target: Path, moves: Mapping[str, np.ndarray]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    writer = None
    try:
        for batch in pq.ParquetFile(file).iter_batches(CHUNK):
            columns = {name: batch.column(name) for name in batch.schema.names}
            columns |= {name: _moved(columns[name], own) for name, own in moves.items()}
            table = pa.table(columns)
            writer = writer or open_writer(target, table.schema)
            writer.write_table(table, row_group_size=CHUNK)
    finally:
        if writer is not None:
            writer.close()


def _moved(column: pa.Array, moves: np.ndarray) -> pa.Array:
    if pa.types.is_integer(column.type):
        return pa.array(moves[column.to_numpy()])
    offsets = np.zeros(len(column) + 1, dtype=np.int64)
    np.cumsum(pc.list_value_length(column).to_numpy(zero_copy_only=False), out=offsets[1:])
    ids = pc.list_flatten(column).to_numpy(zero_copy_only=False)
    return pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(moves[ids]))
