"""A batch of random ids and numbers, to try a model without data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ctr_models.batch import Batch, EncodedRows, Ragged
from ctr_models.candidates import Candidates
from ctr_models.schema import Schema


def example_rows(schema: Schema, *, rows: int, seed: int = 0) -> EncodedRows:
    """Return random encoded rows; a tenth of the ids is missing, some histories are empty.

    Args:
        schema: the fields.
        rows: how many.
        seed: same seed, same rows.
    """
    random = np.random.default_rng(seed)

    def ids(table: int, count: int) -> np.ndarray:
        drawn = random.integers(0, table, count, dtype=np.int32)
        return np.where(random.random(count) < 0.1, np.int32(0), drawn)

    single = [ids(f.rows, rows) for f in schema.sparse if f.kind == "categorical"]
    ragged = {}
    for f in (*schema.sparse, *schema.sequences):
        if f.kind != "categorical":
            offsets = np.concatenate([[0], np.cumsum(random.integers(0, min(f.max_length, 5) + 1, rows))])
            ragged[f.name] = Ragged(ids(f.rows, int(offsets[-1])), offsets.astype(np.int64))
    found = EncodedRows(
        schema=schema,
        dense=random.standard_normal((rows, len(schema.dense)), dtype=np.float32),
        single=np.stack(single) if single else np.empty((0, rows), np.int32),
        ragged=ragged,
        label=random.integers(0, 2, rows).astype(np.float32),
        group=random.integers(0, max(rows // 4, 1), rows),
    )
    if not schema.tasks:
        return found
    targets = random.integers(0, 2, (rows, len(schema.tasks))).astype(np.float32)
    targets[random.random(targets.shape) < 0.3] = np.nan
    return replace(found, targets=targets)


def example_batch(schema: Schema, *, rows: int = 4, seed: int = 0) -> Batch:
    """Return a random Batch.

    Args:
        schema: the fields.
        rows: B.
        seed: same seed, same batch.

    Example:
        >>> len(example_batch(Schema.of({"user": 10}), rows=3))
        3
    """
    return example_rows(schema, rows=rows, seed=seed).batch()


def example_candidates(schema: Schema, *, counts: Sequence[int] = (4,), seed: int = 0) -> Candidates:
    """Return random candidates, to try how a model scores requests.

    What the fields of role ``user`` and ``context`` say is shared, crosses with a field of the item left out.

    Args:
        schema: the fields.
        counts: candidates of each user.
        seed: same seed, same candidates.

    Example:
        >>> schema = Schema.of({"user": 10, "item": 20, "hour": 24}, roles={"user": "user", "item": "item"})
        >>> candidates = example_candidates(schema, counts=[3, 2])
        >>> len(candidates), sorted(candidates.names)
        (5, ['hour', 'user'])
    """
    own = {f.name for f in schema.fields if f.role == "item"}
    own |= {f.name for f in schema.sparse if not own.isdisjoint(f.of)}
    shared = [f.name for f in schema.fields if f.name not in own]
    users = example_rows(schema.only(shared), rows=len(counts), seed=seed)
    items = example_rows(schema.only(own), rows=sum(counts), seed=seed + 1)
    return Candidates.of(users, items, counts)
