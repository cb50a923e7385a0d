from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import (
    column_wise,
    construct_module_sharding_plan,
    data_parallel,
    row_wise,
    table_wise,
)
from torchrec.distributed.types import ShardingEnv, ShardingPlan
from torchrec.modules.fused_embedding_modules import fuse_embedding_optimizer
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.sparse.jagged_tensor import JaggedTensor

from ctr_models import DenseField, EncodedRows, FeatureEmbedding, IdField, Schema, example_batch, example_rows
from ctr_models.embeddings.feature_embedding import mean_pool
from ctr_models.errors import ConfigError

MIXED = Schema(
    dense=(DenseField(name="price", dim=8), DenseField(name="age", dim=8)),
    sparse=(
        IdField(name="user", rows=30, dim=8),
        IdField(name="tags", rows=12, dim=8, kind="multi", max_length=4),
        IdField(name="item", rows=20, dim=8),
        IdField(name="friend", rows=30, dim=8, table="user"),
        IdField(name="bought_with", rows=20, dim=8, table="item", kind="multi", max_length=3),
    ),
    sequences=(IdField(name="clicks", rows=20, dim=8, table="item", kind="sequence", target="item", max_length=5),),
)
UNEVEN = Schema(
    dense=(DenseField(name="price", dim=2), DenseField(name="age", dim=3)),
    sparse=(IdField(name="user", rows=9, dim=4), IdField(name="item", rows=7, dim=5)),
    sequences=(
        IdField(name="clicks", rows=7, dim=5, table="item", kind="sequence", max_length=4),
        IdField(name="shops", rows=6, dim=3, kind="sequence", max_length=4),
    ),
)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def weight(embedding: FeatureEmbedding, table: str) -> Tensor:
    (found,) = [p for n, p in embedding.state_dict().items() if n.endswith(f".{table}.weight")]
    return found


def by_hand(embedding: FeatureEmbedding, schema: Schema, rows: EncodedRows, row: int) -> dict[str, Tensor]:
    """What each field's vector should be, one value at a time."""
    found, start = {}, 0
    for i, f in enumerate(schema.dense):
        assert embedding.dense_vectors is not None
        found[f.name] = float(rows.dense[row, i]) * embedding.dense_vectors[start : start + f.dim]
        start += f.dim
    single = [f for f in schema.sparse if f.kind == "categorical"]
    for i, f in enumerate(single):
        found[f.name] = weight(embedding, f.table)[int(rows.single[i, row])]
    for f in (*schema.sparse, *schema.sequences):
        if f.kind != "categorical":
            ids, _ = rows.ragged[f.name].take(np.array([row]))
            vectors = weight(embedding, f.table)[torch.from_numpy(ids).long()]
            found[f.name] = vectors.mean(0) if len(ids) else torch.zeros(f.dim)
    return found


@pytest.mark.parametrize(
    "schema", [MIXED, UNEVEN, Schema.of({"user": 9, "item": 7})], ids=["mixed", "uneven", "plain"]
)
def test_each_field_is_what_looking_it_up_by_hand_gives(schema: Schema) -> None:
    embedding, rows = FeatureEmbedding(schema, std=1.0), example_rows(schema, rows=7)
    embedded = embedding(rows.batch())
    assert sorted(embedded.names) == sorted(f.name for f in schema.fields)
    assert embedded.flat.shape == (7, schema.width)
    for row in range(7):
        for name, vector in by_hand(embedding, schema, rows, row).items():
            torch.testing.assert_close(embedded.field(name)[row], vector)


def test_histories_come_whole_and_in_order() -> None:
    embedding, rows = FeatureEmbedding(MIXED, std=1.0), example_rows(MIXED, rows=7)
    history = embedding(rows.batch()).sequences["clicks"]
    ids, lengths = rows.ragged["clicks"].take(np.arange(7))
    assert history.lengths().tolist() == lengths.tolist()
    assert torch.equal(history.values(), weight(embedding, "item")[torch.from_numpy(ids).long()])


def test_a_plain_embedding_is_the_collection_s_own_tensor() -> None:
    embedding = FeatureEmbedding(Schema.of({"user": 9, "item": 7}))
    out: list[Tensor] = []
    assert embedding.bags is not None
    embedding.bags.register_forward_hook(lambda m, i, keyed: out.append(keyed.values()))
    assert embedding(example_batch(Schema.of({"user": 9, "item": 7}))).flat is out[0]


def test_stacked_is_a_view() -> None:
    embedded = FeatureEmbedding(MIXED)(example_batch(MIXED, rows=3))
    stacked = embedded.stacked()
    assert stacked.shape == (3, 8, 8)
    assert stacked.data_ptr() == embedded.flat.data_ptr()
    assert torch.equal(stacked[:, embedded.names.index("item")], embedded.field("item"))


def test_some_fields_only() -> None:
    rows = example_rows(MIXED, rows=5)
    for names in (["age", "user"], ["item", "tags"], ["clicks"], ["price"], ["bought_with", "friend"]):
        part = FeatureEmbedding(MIXED, std=1.0, fields=names, prefix="own_")
        embedded = part(rows.batch())
        assert sorted(embedded.names) == sorted(names)
        assert all(t.startswith("own_") for t in part.table_of)
        for row in range(5):
            expected = by_hand_of(part, names, rows, row)
            for name in names:
                torch.testing.assert_close(embedded.field(name)[row], expected[name])


def by_hand_of(part: FeatureEmbedding, names: list[str], rows: EncodedRows, row: int) -> dict[str, Tensor]:
    """As :func:`by_hand`, for an embedding of some fields under the prefix ``own_``."""
    found = {}
    dense = [f for f in MIXED.dense if f.name in names]
    for i, f in enumerate(dense):
        assert part.dense_vectors is not None
        column = [d.name for d in MIXED.dense].index(f.name)
        found[f.name] = float(rows.dense[row, column]) * part.dense_vectors[i * 8 : i * 8 + 8]
    single = [f for f in MIXED.sparse if f.kind == "categorical"]
    for f in (*MIXED.sparse, *MIXED.sequences):
        if f.name not in names:
            continue
        if f.kind == "categorical":
            ids = rows.single[single.index(f), row : row + 1]
        else:
            ids, _ = rows.ragged[f.name].take(np.array([row]))
        vectors = weight(part, f"own_{f.table}")[torch.from_numpy(ids).long()]
        found[f.name] = vectors.mean(0) if len(ids) else torch.zeros(f.dim)
    return found


def test_parameters_are_told_apart() -> None:
    embedding = FeatureEmbedding(MIXED)
    tables, dense = list(embedding.table_parameters()), list(embedding.dense_parameters())
    assert sorted(tuple(p.shape) for p in tables) == [(12, 8), (20, 8), (30, 8)]
    assert [tuple(p.shape) for p in dense] == [(16,)]
    assert [id(p) for p in embedding.embedding_parameters()] == [id(p) for p in (*tables, *dense)]
    assert {id(p) for p in embedding.parameters()} == {id(p) for p in (*tables, *dense)}


def test_initial_vectors_have_the_deviation_asked_for() -> None:
    torch.manual_seed(0)
    embedding = FeatureEmbedding(Schema.of({"user": 20_000}, dim=8), std=0.02)
    (table,) = embedding.table_parameters()
    assert table.std().item() == pytest.approx(0.02, rel=0.02)
    assert table.mean().item() == pytest.approx(0, abs=1e-3)


def test_an_unknown_field_is_named() -> None:
    with pytest.raises(ConfigError, match=r"no field 'itm'.*did you mean 'item'"):
        FeatureEmbedding(MIXED, fields=["itm"])
    with pytest.raises(ConfigError, match="no field to embed"):
        FeatureEmbedding(Schema())


def test_fused_tables_give_the_same_vectors_and_learn() -> None:
    schema = Schema.of({"user": 9, "item": 7}, dense=["price"], dim=8)
    plain, batch = FeatureEmbedding(schema, std=1.0), example_batch(schema, rows=6)
    fused = FeatureEmbedding(schema)
    fuse_embedding_optimizer(fused, torch.optim.SGD, {"lr": 0.1}, torch.device("cpu"))
    assert set(fused.state_dict()) == set(plain.state_dict())
    fused.load_state_dict(plain.state_dict())
    torch.testing.assert_close(fused(batch).flat, plain(batch).flat)

    fused(batch).flat.square().sum().backward()
    plain(batch).flat.square().sum().backward()
    for table, updated in zip(plain.table_parameters(), fused.table_parameters(), strict=True):
        assert table.grad is not None
        torch.testing.assert_close(updated.detach(), table.detach() - 0.1 * table.grad)


@pytest.fixture
def _one_rank(tmp_path: Path) -> Iterator[None]:
    kept = {k: os.environ.get(k) for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    for key, value in kept.items():
        os.environ.pop(key) if value is None else os.environ.update({key: value})


@pytest.mark.usefixtures("_one_rank")
@pytest.mark.parametrize(
    "kinds", ["row row", "table table", "column column", "row table", "data row", "table data"]
)
def test_sharded_it_is_the_same(kinds: str) -> None:
    how = {
        "row": row_wise(),
        "table": table_wise(rank=0),
        "column": column_wise(ranks=[0]),
        "data": data_parallel(),
    }
    first, second = (how[k] for k in kinds.split())
    plain, batch = FeatureEmbedding(MIXED, std=1.0), example_batch(MIXED, rows=6)
    model = FeatureEmbedding(MIXED)
    # Without a fused optimiser, TorchRec's kernel for unpooled tables on CPU is wrong.
    apply_optimizer_in_backward(torch.optim.SGD, model.table_parameters(), {"lr": 0.1})
    bags, lookups = EmbeddingBagCollectionSharder(), EmbeddingCollectionSharder()
    where = {"world_size": 1, "local_size": 1, "device_type": "cpu"}
    assert model.bags is not None
    plan = ShardingPlan(
        {
            "bags": construct_module_sharding_plan(
                model.bags, {"user": first, "tags": second}, sharder=bags, **where
            ),
            "lookups.8": construct_module_sharding_plan(
                model.lookups["8"], {"item": row_wise()}, sharder=lookups, **where
            ),
        }
    )
    env = ShardingEnv.from_process_group(dist.group.WORLD)
    sharded = DistributedModelParallel(
        model, device=torch.device("cpu"), env=env, plan=plan, sharders=[bags, lookups]
    )
    for name, value in sharded.state_dict().items():
        source = plain.state_dict()[name]
        for shard in value.local_shards() if hasattr(value, "local_shards") else ():
            shard.tensor.copy_(source)
        if isinstance(value, Tensor) and not hasattr(value, "local_shards"):
            value.copy_(source)
    embedded, expected = sharded(batch), plain(batch)
    assert embedded.names == expected.names
    torch.testing.assert_close(embedded.flat, expected.flat)
    torch.testing.assert_close(embedded.sequences["clicks"].values(), expected.sequences["clicks"].values())


def test_mean_pool_of_nothing() -> None:
    empty = JaggedTensor(values=torch.empty(0, 3), lengths=torch.zeros(2, dtype=torch.int32))
    assert torch.equal(mean_pool(empty), torch.zeros(2, 3))


def test_mean_pool_gradients() -> None:
    values = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([2, 0, 3])
    assert torch.autograd.gradcheck(lambda v: mean_pool(JaggedTensor(values=v, lengths=lengths)), (values,))
