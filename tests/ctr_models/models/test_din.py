from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch

from ctr_models import CTRModel, IdField, Schema, create_model, example_batch

SCHEMA = Schema(
    sparse=(IdField(name="user", rows=12, dim=4), IdField(name="item", rows=9, dim=4)),
    sequences=(IdField(name="clicks", rows=9, dim=4, table="item", kind="sequence", target="item", max_length=6),),
)
PLAIN = Schema.of({"user": 12, "item": 9}, dim=4)


def make(name: str, schema: Schema = SCHEMA, **options: Any) -> CTRModel:
    torch.manual_seed(0)
    return create_model(name, schema, embedding_std=0.5, mlp={"hidden": [8, 6]}, **options).eval()


def test_it_is_a_perceptron_on_fields_and_interests() -> None:
    model, batch = make("din", attention={"hidden": [5]}), example_batch(SCHEMA, rows=7)
    embedded = model.inputs.embed(batch)
    history, q = embedded.sequences["clicks"], embedded.field("item")
    attention = model.interest.attentions[0]
    interests = []
    for row, k in enumerate(history.to_dense()):
        asked = q[row].expand_as(k)
        scores = attention.rest(attention.first(torch.cat([asked, k, asked - k, asked * k], dim=1)))  # (T, 1)
        interests.append((scores * k).sum(0))
    others = [embedded.field(n) for n in embedded.names if n != "clicks"]
    expected = model.mlp(torch.cat([*others, torch.stack(interests)], dim=1)).squeeze(1)
    torch.testing.assert_close(model(batch), expected)


def test_without_histories_it_is_dnn() -> None:
    dnn, batch = make("dnn", PLAIN), example_batch(PLAIN, rows=7)
    din = create_model("din", PLAIN, mlp={"hidden": [8, 6], "activation": "relu"}).eval()
    din.load_state_dict(dnn.state_dict())
    assert torch.equal(din(batch), dnn(batch))


def test_the_order_of_a_history_does_not_matter_but_the_candidate_does() -> None:
    model, batch = make("din"), example_batch(SCHEMA, rows=16)
    offsets = batch.sequences.offsets().tolist()
    values = batch.sequences.values()
    before = model(batch)
    for start, stop in pairwise(offsets):
        values[start:stop] = values[start:stop].flip(0)
    torch.testing.assert_close(model(batch), before)
    interests = model.interest(model.inputs.embed(batch)).field("clicks")
    items = batch.sparse.values()[16:]
    items.copy_((items + 1) % 9)
    other = model.interest(model.inputs.embed(batch)).field("clicks")
    some = batch.sequences.lengths() > 0
    assert (other != interests).any(1)[some].all()
