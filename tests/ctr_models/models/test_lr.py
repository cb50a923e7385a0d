from __future__ import annotations

import torch

from ctr_models import Schema, create_model, example_batch


def test_it_has_no_slot_and_one_weight_a_value() -> None:
    schema = Schema.of({"user": 9, "item": 7})
    model, batch = create_model("lr", schema, embedding_std=1.0), example_batch(schema, rows=5)
    assert model.default_gates == {}
    tables = [p[:, 0] for p in model.linear.embedding.table_parameters()]
    ids = [batch.sparse[f].values().long() for f in ("user", "item")]
    torch.testing.assert_close(model(batch), tables[0][ids[0]] + tables[1][ids[1]] + model.linear.bias)
