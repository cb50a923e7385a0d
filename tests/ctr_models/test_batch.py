from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from ctr_models import Batch, EncodedRows, IdField, Ragged, Schema, example_rows

PLAIN = Schema.of({"user": 9, "item": 7}, dense=["price"])
RAGGED = Schema(
    sparse=(
        IdField(name="tags", rows=8, kind="multi", max_length=4),
        IdField(name="user", rows=9),
        IdField(name="item", rows=7),
    ),
    sequences=(IdField(name="history", rows=7, table="item", kind="sequence", max_length=5),),
)


def as_lists(batch: Batch) -> list[dict[str, list[int]]]:
    """Ids by field for each row, read value by value."""
    found: list[dict[str, list[int]]] = [{} for _ in range(len(batch))]
    for keyed in (batch.sparse, batch.sequences):
        position, lengths = 0, keyed.lengths().view(-1, len(batch)) if keyed.keys() else None
        for i, key in enumerate(keyed.keys()):
            assert lengths is not None
            for row, length in enumerate(lengths[i].tolist()):
                found[row][key] = keyed.values()[position : position + length].tolist()
                position += length
    return found


def rows_as_lists(rows: EncodedRows, row: int) -> dict[str, list[int]]:
    single = [f.name for f in rows.schema.sparse if f.kind == "categorical"]
    found = {name: [int(rows.single[i, row])] for i, name in enumerate(single)}
    for name, ragged in rows.ragged.items():
        found[name] = ragged.values[ragged.offsets[row] : ragged.offsets[row + 1]].tolist()
    return found


@pytest.mark.parametrize("schema", [PLAIN, RAGGED], ids=["plain", "ragged"])
@pytest.mark.parametrize(
    "chosen", [None, np.array([3]), np.array([5, 1, 1, 8]), slice(2, 6)], ids=["all", "one", "some", "slice"]
)
def test_a_batch_holds_exactly_the_chosen_rows(schema: Schema, chosen: np.ndarray | slice | None) -> None:
    rows = example_rows(schema, rows=9)
    wanted = np.arange(9)[slice(None) if chosen is None else chosen]
    batch = rows.batch(chosen)
    assert len(batch) == len(wanted)
    assert as_lists(batch) == [rows_as_lists(rows, int(i)) for i in wanted]
    assert torch.equal(batch.dense, torch.from_numpy(rows.dense[wanted]))
    assert torch.equal(batch.label, torch.from_numpy(rows.label[wanted]))
    assert torch.equal(batch.group, torch.from_numpy(rows.group[wanted]))
    assert batch.sparse.keys() == [f.name for f in schema.sparse]
    assert batch.sparse.values().dtype == torch.int32


def test_sizes_that_are_known_are_told_not_counted() -> None:
    sparse = example_rows(PLAIN, rows=4).batch().sparse
    assert sparse._length_per_key == [4, 4]
    assert sparse._offset_per_key == [0, 4, 8]
    assert sparse.offsets().tolist() == list(range(9))


THREADS = """
import os, threading
import numpy as np
from ctr_models import Schema, example_rows
rows = example_rows(Schema.of({f"c{i}": 100 for i in range(40)}, dense=["x"], dim=4), rows=4096)
rows.batch(np.arange(4096))
before = len(os.listdir("/proc/self/task"))
def cut():
    rows.batch(np.arange(4095))
    print(len(os.listdir("/proc/self/task")) - before)
thread = threading.Thread(target=cut)
thread.start()
thread.join()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_cutting_a_batch_starts_no_threads() -> None:
    """The loader's thread must not bring OpenMP threads of its own: the trainer's would wait for them."""
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, check=True, env=environment)
    assert int(done.stdout) == 1  # the thread itself


def test_to_keeps_everything() -> None:
    batch = example_rows(RAGGED, rows=5).batch()
    moved = batch.to(torch.device("cpu"))
    assert as_lists(moved) == as_lists(batch)
    assert len(moved) == 5


def test_labels_of_further_tasks_go_where_the_rows_go() -> None:
    rows = example_rows(Schema.of({"user": 9}, tasks=["conversion", "return"]), rows=12)
    assert rows.targets is not None
    assert np.isnan(rows.targets).any()
    for chosen in (np.array([7, 2, 2]), slice(3, 8)):
        batch = rows.batch(chosen).to(torch.device("cpu"))
        assert batch.targets is not None
        assert batch.targets.dtype == torch.float32
        np.testing.assert_array_equal(batch.targets.numpy(), rows.targets[chosen])
    assert example_rows(PLAIN, rows=3).batch().to(torch.device("cpu")).targets is None


def test_ragged_take() -> None:
    ragged = Ragged(np.array([1, 2, 3, 4], np.int32), np.array([0, 2, 2, 4]))
    values, lengths = ragged.take(np.array([2, 1, 0, 2]))
    assert values.tolist() == [3, 4, 1, 2, 3, 4]
    assert lengths.tolist() == [2, 0, 2, 2]
    values, lengths = ragged.take(np.array([], dtype=np.int64))
    assert values.tolist() == lengths.tolist() == []
