"""Some rows of encoded files, evenly spread, small enough to be looked at whole."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ctr_models.batch import EncodedRows
from ctr_models.schema import Schema
from pipelines.features.transform import encoded_rows

ROWS = 20_000
"""About as many are taken."""
_CHUNKS = 8


def sampled(files: Sequence[Path], schema: Schema) -> EncodedRows | None:
    """Return rows evenly spread over some row groups, themselves evenly spread over the files; None without rows.

    Args:
        files: encoded Parquet.
        schema: that they were encoded for.
    """
    counts = [(path, pq.read_metadata(path)) for path in files]
    groups = [(path, i) for path, told in counts if told.num_rows for i in range(told.num_row_groups)]
    if not groups:
        return None
    chosen = [groups[i] for i in np.unique(np.linspace(0, len(groups) - 1, _CHUNKS).astype(int))]
    parts = []
    for path, group in chosen:
        table = pq.ParquetFile(path).read_row_group(group)
        step = max(1, -(-table.num_rows * len(chosen) // ROWS))
        parts.append(table.take(np.arange(0, table.num_rows, step)))
    return encoded_rows(pa.concat_tables(parts, promote_options="default"), schema)
