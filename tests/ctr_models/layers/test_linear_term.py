from __future__ import annotations

import torch

from ctr_models import Schema, example_batch
from ctr_models.layers.linear_term import LinearTerm

SCHEMA = Schema.of({"user": 9, "item": 7}, dense=["price"], dim=6)


def test_it_is_one_weight_a_value() -> None:
    torch.manual_seed(0)
    term, batch = LinearTerm(SCHEMA, std=1.0), example_batch(SCHEMA, rows=5)
    weights = term.embedding.bags.state_dict()  # type: ignore[union-attr]
    tables = {f: weights[f"embedding_bags.linear_{f}.weight"] for f in ("user", "item")}
    expected = term.bias + batch.dense[:, 0] * term.embedding.dense_vectors[0]  # type: ignore[index]
    for f in ("user", "item"):
        expected = expected + tables[f][batch.sparse[f].values().long(), 0]
    torch.testing.assert_close(term(batch), expected)


def test_tables_are_wide_enough_for_fbgemm_and_only_the_first_column_learns() -> None:
    term = LinearTerm(SCHEMA, std=1.0)
    term(example_batch(SCHEMA, rows=5)).sum().backward()
    for table in term.embedding.table_parameters():
        assert table.shape[1] % 4 == 0
        assert table.grad is not None
        assert table.grad[:, 0].any()
        assert not table.grad[:, 1:].any()
