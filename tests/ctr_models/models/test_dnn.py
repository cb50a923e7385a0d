from __future__ import annotations

import torch

from ctr_models import Schema, create_model, example_batch


def test_it_is_an_mlp_on_the_embedding() -> None:
    schema = Schema.of({"user": 9, "item": 7}, dim=4)
    model, batch = create_model("dnn", schema, mlp={"hidden": [6]}, embedding_std=1.0), example_batch(schema)
    assert torch.equal(model(batch), model.mlp(model.inputs.embedding(batch).flat).squeeze(1))
    assert sum(p.numel() for p in model.parameters()) == 16 * 4 + 8 * 6 + 6 + 6 + 1
