from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ctr_models import EncodedRows, IdField, Ragged, Schema, create_model, example_batch
from ctr_models.errors import ConfigError
from ctr_models.layers.transitions import TransitionDistillation
from ctr_models.next_item import NextItemLoss, NextItemModel

SCHEMA = Schema(
    sparse=(IdField(name="item", rows=9, dim=4),),
    sequences=(IdField(name="seen", rows=9, dim=4, table="item", kind="sequence", target="item", max_length=20),),
)
HISTORIES, ITEMS = [[2, 3, 4], [], [5, 0, 6, 1], [7, 8, 2, 3, 4, 5]], [5, 6, 1, 6]


def make(**options: Any) -> NextItemModel:
    torch.manual_seed(0)
    model = create_model("mqsa_ted", SCHEMA, embedding_std=0.5, linear=False, **options)
    assert isinstance(model, NextItemModel)
    return model.eval()


def batch():  # type: ignore[no-untyped-def]
    offsets = np.cumsum([0, *map(len, HISTORIES)])
    return EncodedRows(
        schema=SCHEMA,
        dense=np.zeros((4, 0), np.float32),
        single=np.array([ITEMS], np.int32),
        ragged={"seen": Ragged(np.array([i for own in HISTORIES for i in own], np.int32), offsets)},
        label=np.ones(4, np.float32),
        group=np.arange(4),
    ).batch()


def test_a_logit_is_the_score_of_the_rows_item() -> None:
    model = make()
    scores = model.users(batch()) @ model.items().T  # (B, N)
    assert scores.shape == (4, 7)
    known = torch.tensor([0, 1, 3])
    torch.testing.assert_close(model(batch())[known], scores[known, torch.tensor([3, 4, 4])])


def test_every_place_has_its_next_item_and_nothing_unreal_is_one() -> None:
    encoded, target, items = make().positions(batch())
    assert (target + 2).tolist() == [3, 4, 5, 6, 8, 2, 3, 4, 5, 6]
    assert (items + 2).tolist() == [2, 3, 4, 5, 6, 7, 8]
    model = make()
    history = model.inputs(batch()).sequences["seen"]
    whole = model.encoder(history.values(), history.offsets())
    assert torch.equal(encoded, whole[[0, 1, 2, 4, 7, 8, 9, 10, 11, 12]])


def test_places_beyond_the_length_are_left_out() -> None:
    model = make(encoder={"name": "mqsa", "length": 2})
    assert (model.positions(batch()).target + 2).tolist() == [4, 5, 5, 6]


def test_missing_and_unknown_are_outside_the_softmax() -> None:
    model = make()
    loss = NextItemLoss()(model, batch())
    encoded, target, _ = model.positions(batch())
    everything = encoded @ model.inputs.tables()["item"].T  # (P, rows), with those of missing and unknown
    assert torch.allclose(loss, F.cross_entropy(everything[:, 2:], target))
    assert not torch.allclose(loss, F.cross_entropy(everything, target + 2))


def test_a_recipe_sets_the_loss() -> None:
    model = make()
    counts = TransitionDistillation([0, 1, 1, 1, 1, 1, 1, 1], [3], [2.0], temperature=0.1)
    model.objective = NextItemLoss(counts, weight=0.5)
    loss, logits = model.loss(batch())
    expected = NextItemLoss()(model, batch()) + 0.5 * counts(model.items(), torch.tensor([0]))
    torch.testing.assert_close(loss, expected)
    assert logits.shape == (4,)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    assert not [name for name in model.state_dict() if name.startswith("objective")]


def test_a_batch_without_a_next_item_costs_nothing() -> None:
    model, empty = make(), example_batch(SCHEMA, rows=2)
    empty.sparse.values().zero_()
    empty.sequences.values().zero_()
    loss = NextItemLoss()(model, empty)
    loss.backward()
    assert loss == 0


@pytest.mark.parametrize(
    ("schema", "options", "message"),
    [
        (SCHEMA, {"history": "sen"}, "model.history: no history 'sen'.*did you mean 'seen'"),
        (Schema.of({"item": 9}), {"linear": False}, "model.linear: without a history and without a linear term"),
        (
            Schema(
                sparse=(IdField(name="item", rows=9),),
                sequences=(IdField(name="words", rows=5, kind="sequence", target="item"),),
            ),
            {},
            "features: no history .words. shares the table of its target",
        ),
    ],
)
def test_what_is_missing_is_named(schema: Schema, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create_model("sasrec", schema, **options)
