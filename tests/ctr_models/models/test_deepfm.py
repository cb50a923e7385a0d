from __future__ import annotations

import pytest
import torch

from ctr_models import Schema, create_model, example_batch
from ctr_models.errors import ConfigError
from ctr_models.schema import IdField


def test_the_logit_is_linear_plus_pairs_plus_deep() -> None:
    schema = Schema.of({"user": 9, "item": 7}, dim=4)
    model, batch = create_model("deepfm", schema, embedding_std=0.5), example_batch(schema)
    flat = model.inputs.embedding(batch).flat
    pairs = (flat[:, :4] * flat[:, 4:]).sum(1)
    torch.testing.assert_close(model(batch), model.linear(batch) + pairs + model.mlp(flat).squeeze(1))


def test_unequal_dimensions_are_refused() -> None:
    uneven = Schema(sparse=(IdField(name="a", rows=3, dim=4), IdField(name="b", rows=3, dim=8)))
    with pytest.raises(ConfigError, match=r"deepfm needs fields of one dimension, found {'a': 4, 'b': 8}"):
        create_model("deepfm", uneven)
