from __future__ import annotations

import numpy as np

from ctr_models import IdField, Schema, example_rows

SCHEMA = Schema(
    sparse=(IdField(name="user", rows=9), IdField(name="tags", rows=5, kind="multi", max_length=3)),
    sequences=(IdField(name="history", rows=7, kind="sequence", max_length=4),),
)


def test_rows_stay_inside_their_tables() -> None:
    rows = example_rows(SCHEMA, rows=200)
    assert rows.single.min() == 0
    assert rows.single.max() == 8
    for name, table, longest in (("tags", 5, 3), ("history", 7, 4)):
        ragged = rows.ragged[name]
        assert 0 <= ragged.values.min() <= ragged.values.max() < table
        lengths = np.diff(ragged.offsets)
        assert lengths.min() == 0
        assert lengths.max() == longest


def test_one_seed_gives_the_same_rows() -> None:
    first, second, other = (example_rows(SCHEMA, rows=20, seed=s) for s in (1, 1, 2))
    assert np.array_equal(first.single, second.single)
    assert not np.array_equal(first.single, other.single)
