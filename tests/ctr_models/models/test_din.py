from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from ctr_models import CTRModel, IdField, Schema, create_model, example_batch
from ctr_models.export import export, tensors

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


@pytest.mark.parametrize("encoder", ["sasrec", "mqsa"])
def test_an_encoder_may_look_at_the_behaviours_first(encoder: str) -> None:
    plain, model = make("din"), make("din", encoder={"name": encoder})
    assert set(plain.state_dict()) < set(model.state_dict())
    left = model.load_state_dict(plain.state_dict(), strict=False)
    assert {name.split(".")[0] for name in left.missing_keys} == {"encoders"}
    batch = example_batch(SCHEMA, rows=16)
    some = batch.sequences.lengths() > 0
    assert torch.equal(model(batch)[~some], plain(batch)[~some])
    assert (model(batch) != plain(batch))[some].all()
    model.train().loss(batch)[0].backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_with_an_encoder_it_can_be_exported() -> None:
    model = make("din", encoder={"name": "mqsa"})
    program = export(model).module()
    for rows in (1, 5):
        batch = example_batch(SCHEMA, rows=rows, seed=rows)
        torch.testing.assert_close(program(*tensors(batch)), model(batch))
