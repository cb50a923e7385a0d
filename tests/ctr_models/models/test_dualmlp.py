from __future__ import annotations

import torch

from ctr_models import Schema, create_model, example_batch


def test_it_is_the_sum_of_two_mlps() -> None:
    schema = Schema.of({"user": 9, "item": 7}, dim=4)
    model = create_model("dualmlp", schema, mlp1={"hidden": [6]}, mlp2={"hidden": [5, 4]}, embedding_std=1.0).eval()
    batch = example_batch(schema)
    flat = model.inputs.embedding(batch).flat
    torch.testing.assert_close(model(batch), (model.mlp1(flat) + model.mlp2(flat)).squeeze(1))
