from __future__ import annotations

import threading

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from ctr_models.errors import ConfigError, DataError
from pipelines.training.loader import Loader


def prices(batches):
    """The numeric field tells rows apart."""
    return np.concatenate([batch.dense[:, 0].numpy() for batch in batches])


def stored(world, split="train"):
    return np.concatenate([pq.read_table(f)["price"].to_numpy() for f in world.files(split)])


def same(a, b):
    tensors = ("dense", "label", "group")
    return all(torch.equal(getattr(a, t), getattr(b, t)) for t in tensors) and all(
        torch.equal(getattr(a, k).values(), getattr(b, k).values())
        and torch.equal(getattr(a, k).lengths(), getattr(b, k).lengths())
        for k in ("sparse", "sequences")
    )


@pytest.mark.parametrize("window", [50, 170, 1_000_000])
@pytest.mark.parametrize("batch", [7, 64, 600, 5000])
def test_an_epoch_holds_every_row_once(world, batch, window):
    loader = Loader(world.files("train"), world.schema, batch_size=batch, shuffle=True, window_rows=window)
    batches = list(loader)
    assert len(batches) == len(loader) == loader.steps == -(-600 // batch)
    assert loader.rows == 600
    found = prices(batches)
    assert sorted(found) == sorted(stored(world))
    assert not np.array_equal(found, stored(world))


def test_without_shuffle_the_order_is_that_of_the_files(world):
    found = list(Loader(world.files("train"), world.schema, batch_size=64))
    assert np.array_equal(prices(found), stored(world))
    table = pq.read_table(world.files("train")[0]).slice(64, 64)
    assert found[1].sparse.keys() == ["user", "item", "tags"]
    assert np.array_equal(found[1].sparse["item"].values().numpy(), table["item"].to_numpy())
    assert found[1].sparse["tags"].lengths().tolist() == [len(tags) for tags in table["tags"].to_pylist()]
    assert found[1].sparse["tags"].values().tolist() == [t for tags in table["tags"].to_pylist() for t in tags]
    assert np.array_equal(found[1].label.numpy(), table["__label__"].to_numpy())
    assert np.array_equal(found[1].group.numpy(), table["__user__"].to_numpy())


def test_seed_and_epoch_decide_the_order(world):
    def rows(**changed):
        settings = {"seed": 1, "epoch": 0, **changed}
        return prices(Loader(world.files("train"), world.schema, batch_size=64, shuffle=True, **settings))

    assert np.array_equal(rows(), rows())
    assert not np.array_equal(rows(), rows(epoch=1))
    assert not np.array_equal(rows(), rows(seed=2))


@pytest.mark.parametrize("start", [0, 1, 5, 9, 10, 12])
def test_starting_late_gives_the_rest_of_the_same_epoch(history_world, start):
    settings = {"batch_size": 64, "seed": 4, "shuffle": True, "parts": 2, "window_rows": 190}
    whole = list(Loader(history_world.files("train"), history_world.schema, **settings))
    late = Loader(history_world.files("train"), history_world.schema, start_step=start, **settings)
    rest = list(late)
    assert len(rest) == len(late) == max(0, 10 - start)
    assert all(same(a, b) for a, b in zip(whole[start:], rest, strict=True))


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("rows", [600, 599])
def test_ranks_together_see_what_one_process_sees(history_world, tmp_path, shuffle, rows):
    file = tmp_path / "part.parquet"
    table = pq.read_table(history_world.files("train")).slice(0, rows)
    pq.write_table(table, file, row_group_size=128)
    settings = {"batch_size": 48, "seed": 4, "shuffle": shuffle, "parts": 4, "window_rows": 200}
    one = list(Loader([file], history_world.schema, **settings))
    ranks = [Loader([file], history_world.schema, rank=r, world=2, **settings) for r in range(2)]
    assert sum(r.rows for r in ranks) == rows
    for whole, *pieces in zip(one, *ranks, strict=True):
        assert torch.equal(whole.dense, torch.cat([p.dense for p in pieces]))
        assert torch.equal(whole.label, torch.cat([p.label for p in pieces]))
        for key in ("user", "tags"):
            values = torch.cat([p.sparse[key].values() for p in pieces])
            assert torch.equal(whole.sparse[key].values(), values)
        histories = torch.cat([p.sequences["history"].values() for p in pieces])
        assert torch.equal(whole.sequences["history"].values(), histories)


def test_a_part_that_is_one_row_short_begins_again(world, tmp_path):
    file = tmp_path / "part.parquet"
    pq.write_table(pq.read_table(world.files("train")).slice(0, 101), file, row_group_size=30)
    expected = stored(world)[:101]
    loaders = [Loader([file], world.schema, batch_size=20, parts=2, rank=r, world=2) for r in range(2)]
    first, second = (prices(loader) for loader in loaders)
    assert [loader.rows for loader in loaders] == [50, 51]
    assert np.array_equal(first, [*expected[:50], expected[0]])
    assert np.array_equal(second, expected[50:])


def test_training_never_meets_a_batch_of_one_row(world, tmp_path):
    file = tmp_path / "part.parquet"
    pq.write_table(pq.read_table(world.files("train")).slice(0, 101), file)
    training = Loader([file], world.schema, batch_size=50, shuffle=True)
    assert [len(batch) for batch in training] == [50, 50]
    evaluation = Loader([file], world.schema, batch_size=50)
    assert [len(batch) for batch in evaluation] == [50, 50, 1]


def test_a_truncated_file_is_named(world, tmp_path):
    file = tmp_path / "part-00000.parquet"
    file.write_bytes(world.files("train")[0].read_bytes()[:-200])
    with pytest.raises(
        DataError, match=r"part-00000\.parquet: can't be read as Parquet .* run sluice features again"
    ):
        Loader([file], world.schema, batch_size=50)


def test_a_damaged_page_reaches_the_consumer(world, tmp_path):
    content = bytearray(world.files("train")[0].read_bytes())
    content[200:2000] = bytes(1800)
    file = tmp_path / "part-00000.parquet"
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"part-00000\.parquet"):
        list(Loader([file], world.schema, batch_size=50))


def test_a_missing_column_is_named(world, tmp_path):
    file = tmp_path / "part-00000.parquet"
    pq.write_table(pq.read_table(world.files("train")[0]).drop_columns(["item"]), file)
    with pytest.raises(DataError, match="column 'item' is missing"):
        list(Loader([file], world.schema, batch_size=50))


def test_leaving_early_ends_the_thread(world):
    batches = iter(Loader(world.files("train"), world.schema, batch_size=4))
    next(batches)
    assert any(t.name == "sluice-loader" for t in threading.enumerate())
    batches.close()
    assert not any(t.name == "sluice-loader" for t in threading.enumerate())


def test_numbers_that_do_not_divide_are_refused(world):
    with pytest.raises(ConfigError, match=r"train\.batch_size: a batch of 50 rows can't be dealt into 4 parts"):
        Loader(world.files("train"), world.schema, batch_size=50, parts=4)
    with pytest.raises(ConfigError, match=r"train\.parts: 3 parts can't be shared by 2 ranks"):
        Loader(world.files("train"), world.schema, batch_size=60, parts=3, world=2)
    with pytest.raises(DataError, match="600 rows for 601 parts"):
        Loader(world.files("train"), world.schema, batch_size=601, parts=601)


def test_the_loader_tells_its_share(world):
    loader = Loader(world.files("train"), world.schema, batch_size=50)
    list(loader)
    assert loader.worked > 0
    assert loader.waited > 0


def test_labels_of_further_tasks_stay_with_their_rows(task_world, world):
    files = task_world.files("train")
    table = pq.read_table(files)
    expected = dict(zip(table["price"].to_numpy(), table["__label_conversion__"].to_numpy(), strict=True))
    batches = list(Loader(files, task_world.schema, batch_size=64, shuffle=True, parts=2, window_rows=170))
    assert all(batch.targets.shape == (len(batch), 1) for batch in batches)
    found = np.concatenate([batch.targets[:, 0].numpy() for batch in batches])
    np.testing.assert_array_equal(found, [expected[p] for p in prices(batches)])
    label = np.concatenate([batch.label.numpy() for batch in batches])
    assert np.array_equal(np.isnan(found), label == 0)
    # A model of one task reads no more than before.
    assert next(iter(Loader(files, world.schema, batch_size=64))).targets is None
