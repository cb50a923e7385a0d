from __future__ import annotations

import itertools

import pytest
import torch

from ctr_models import IdField, Schema, create_model, example_batch
from ctr_models.errors import ConfigError

SCHEMA = Schema.of({"user": 9, "item": 7, "hour": 5}, dim=4)


def test_the_logit_is_linear_plus_pairs() -> None:
    model, batch = create_model("fm", SCHEMA, embedding_std=0.5), example_batch(SCHEMA, rows=6)
    e = model.inputs.embedding(batch).stacked()
    pairs = sum((e[:, i] * e[:, j]).sum(1) for i, j in itertools.combinations(range(3), 2))
    torch.testing.assert_close(model(batch), model.linear(batch) + pairs)


def test_the_pairs_see_the_gated_embeddings() -> None:
    torch.manual_seed(0)
    model = create_model("fm", SCHEMA, embedding_std=0.5, gates={"feature": {"name": "sigmoid2", "hidden": []}})
    batch = example_batch(SCHEMA, rows=6)
    e = (model.inputs.embedding(batch).flat * model.inputs.feature_gates[0](torch.empty(1, 12))).view(6, 3, 4)
    pairs = sum((e[:, i] * e[:, j]).sum(1) for i, j in itertools.combinations(range(3), 2))
    torch.testing.assert_close(model(batch), model.linear(batch) + pairs)


def test_unequal_dimensions_are_refused() -> None:
    uneven = Schema(sparse=(IdField(name="a", rows=3, dim=4), IdField(name="b", rows=3, dim=8)))
    with pytest.raises(ConfigError, match=r"fm needs fields of one dimension, found {'a': 4, 'b': 8}"):
        create_model("fm", uneven)
