"""Tables of lower rank, taken to the dimension that a model asks for."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from ctr_models import DenseField, FeatureEmbedding, IdField, Schema, create_model, example_batch
from ctr_models.embeddings.alignment import Alignment
from ctr_models.export import export, tensors

SCHEMA = Schema(
    dense=(DenseField(name="price", dim=6),),
    sparse=(
        IdField(name="tags", rows=7, dim=6, rank=2, kind="multi", max_length=4),
        IdField(name="user", rows=12, dim=6),
        IdField(name="item", rows=9, dim=6, rank=3),
    ),
    sequences=(
        IdField(name="seen", rows=9, dim=6, rank=3, table="item", kind="sequence", target="item", max_length=5),
    ),
)


def test_one_layer_a_table_that_needs_one() -> None:
    align = Alignment((*SCHEMA.sparse, *SCHEMA.sequences), "my_")
    assert {name: tuple(layer.weight.shape) for name, layer in align.tables.items()} == {
        "my_tags": (6, 2),
        "my_item": (6, 3),
    }
    x = torch.randn(4, 3)
    assert torch.equal(align("item", x), align("seen", x))
    assert torch.equal(align("user", x), x)


def test_it_is_the_full_table_of_a_product() -> None:
    """Pooling goes before or after: the layer is linear and has no bias."""
    torch.manual_seed(0)
    short, full = FeatureEmbedding(SCHEMA, std=1.0), FeatureEmbedding(SCHEMA.with_dim(6), std=1.0)
    with torch.no_grad():
        full.dense_vectors.copy_(short.dense_vectors)
        for table, weight in short.tables().items():
            layer = short.align.tables[table].weight if table in short.align.tables else torch.eye(6)
            full.tables()[table].copy_(F.linear(weight, layer))
    batch = example_batch(SCHEMA, rows=30)
    found, expected = short(batch), full(batch)
    assert (found.names, found.dims) == (expected.names, expected.dims)
    torch.testing.assert_close(found.flat, expected.flat)
    torch.testing.assert_close(found.sequences["seen"].values(), expected.sequences["seen"].values())
    assert short.width == sum(short.dims) == found.flat.shape[1]


def test_a_model_upon_it_trains_and_exports() -> None:
    torch.manual_seed(0)
    model = create_model("fm", SCHEMA, embedding_std=0.3)
    model.loss(example_batch(SCHEMA, rows=64))[0].backward()
    for path, parameter in model.named_parameters():
        assert parameter.grad is not None, path
        assert parameter.grad.abs().max() > 0, path
    program = export(model.eval()).module()
    for rows in (1, 7):
        batch = example_batch(SCHEMA, rows=rows, seed=rows)
        torch.testing.assert_close(program(*tensors(batch)), model(batch), rtol=1e-5, atol=1e-6)


def test_fields_of_one_table_agree_on_its_rank() -> None:
    with pytest.raises(ValueError, match="fields of table 'item' differ in rows or dim"):
        Schema(sparse=(IdField(name="item", rows=9, rank=3), IdField(name="other", rows=9, table="item")))
