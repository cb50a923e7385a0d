from __future__ import annotations

import itertools

import pytest
import torch

from ctr_models import IdField, Schema, create_model, example_batch
from ctr_models.errors import ConfigError

SCHEMA = Schema.of({"user": 9, "item": 7, "hour": 5}, dim=4)


def test_the_perceptron_sees_embeddings_and_products() -> None:
    model, batch = create_model("ipnn", SCHEMA, embedding_std=0.5), example_batch(SCHEMA, rows=6)
    e = model.inputs.embedding(batch).stacked()
    products = [(e[:, i] * e[:, j]).sum(1, keepdim=True) for i, j in itertools.combinations(range(3), 2)]
    torch.testing.assert_close(model(batch), model.mlp(torch.cat([e.flatten(1), *products], dim=1)).squeeze(1))


def test_unequal_dimensions_are_refused() -> None:
    uneven = Schema(sparse=(IdField(name="a", rows=3, dim=4), IdField(name="b", rows=3, dim=8)))
    with pytest.raises(ConfigError, match=r"ipnn needs fields of one dimension, found {'a': 4, 'b': 8}"):
        create_model("ipnn", uneven)
