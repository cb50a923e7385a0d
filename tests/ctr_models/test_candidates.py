from __future__ import annotations

import numpy as np
import pytest
import torch

from ctr_models import (
    Batch,
    Candidates,
    CTRModel,
    IdField,
    Schema,
    create_model,
    example_candidates,
    takes_candidates,
)
from ctr_models.candidates import spread_ids
from ctr_models.example import example_rows
from ctr_models.models.dnn import DNN

SCHEMA = Schema(
    sparse=(
        IdField(name="user", rows=9, role="user"),
        IdField(name="item", rows=8, role="item"),
        IdField(name="tags", rows=5, kind="multi", max_length=3),
        IdField(name="cross", rows=5, of=("user", "item")),
    ),
    sequences=(IdField(name="history", rows=7, kind="sequence", max_length=4),),
)
SHARED = ["user", "tags", "history"]


def rows_of_both(counts: list[int]):
    users = example_rows(SCHEMA.only(SHARED), rows=len(counts))
    return users, example_rows(SCHEMA.only(["item", "cross"]), rows=sum(counts), seed=1)


def test_roles_and_crosses_say_what_is_shared_in_an_example() -> None:
    candidates = example_candidates(SCHEMA, counts=[2, 0, 3])
    assert candidates.names == frozenset(SHARED)
    assert candidates.offsets.tolist() == [0, 2, 2, 5]
    assert candidates.user.tolist() == [0, 0, 2, 2, 2]


@pytest.mark.parametrize("counts", [[3], [2, 0, 4]])
def test_joined_they_are_the_rows_of_a_plain_batch(counts: list[int]) -> None:
    users, own = rows_of_both(counts)
    batch = Candidates.of(users, own, counts).joined(SCHEMA)
    of = np.repeat(np.arange(len(counts)), counts)
    shared, alone = users.batch(of), own.batch()  # each user's row as often as it has candidates
    found, expected = batch.sparse.to_dict(), {**shared.sparse.to_dict(), **alone.sparse.to_dict()}
    assert batch.sparse.keys() == [f.name for f in SCHEMA.sparse]
    for name in found:
        assert found[name].to_dense()[0].dtype == torch.int32
        assert torch.equal(found[name].values(), expected[name].values())
        assert torch.equal(found[name].lengths(), expected[name].lengths())
    assert torch.equal(batch.sequences.values(), shared.sequences.values())
    assert torch.equal(batch.sequences.lengths(), shared.sequences.lengths())


def test_pieces_may_be_empty_and_repeated() -> None:
    found = spread_ids(torch.arange(5), torch.tensor([4, 0, 2, 0]), torch.tensor([1, 0, 2, 3]))
    assert found.tolist() == [4, 2, 3, 0, 1, 2]
    assert spread_ids(torch.arange(5), torch.empty(0).int(), torch.empty(0).int()).tolist() == []


def test_what_is_shared_is_looked_up_once_a_user(monkeypatch) -> None:
    looked_up, plain = [], torch.embedding

    def embedding(weight, ids):
        looked_up.append(len(ids))
        return plain(weight, ids)

    monkeypatch.setattr(torch, "embedding", embedding)
    users, own = rows_of_both([500])
    create_model("dnn", SCHEMA).eval().scores(Candidates.of(users, own))
    assert sum(looked_up) == 2 * 500 + 1 + len(users.ragged["tags"].values) + len(users.ragged["history"].values)


def test_a_subclass_with_a_forward_of_its_own_gets_plain_rows() -> None:
    seen = []

    class Own(DNN):
        def forward(self, batch: Batch) -> torch.Tensor:
            seen.append(batch)
            return super().forward(batch)

    class Telling(Own):
        forward = takes_candidates(lambda self, batch: Own.forward(self, batch))

    candidates = example_candidates(SCHEMA, counts=[3])
    for kind in (Own, Telling):
        model: CTRModel = create_model("dnn", SCHEMA).eval()
        model.__class__ = kind
        model.scores(candidates)
        assert model.shares == (kind is Telling)
    assert [type(one) for one in seen] == [Batch, Candidates]


def test_counts_that_do_not_fit_are_refused() -> None:
    users, own = rows_of_both([3, 2])
    for counts in ([3], [3, 3], None):
        with pytest.raises(ValueError, match="give one number a user"):
            Candidates.of(users, own, counts)


@pytest.mark.parametrize("names", [["user"], ["user", "tags", "history", "item"]], ids=["too few", "too many"])
def test_fields_that_do_not_make_up_the_schema_are_refused(names: list[str]) -> None:
    users = example_rows(SCHEMA.only(names), rows=1)
    _, own = rows_of_both([4])
    with pytest.raises(ValueError, match="schema.only"):
        create_model("dnn", SCHEMA).eval().scores(Candidates.of(users, own))


def test_numbers_that_do_not_make_up_the_schema_are_refused() -> None:
    schema = Schema.of({"user": 9}, dense=["age", "price"])
    users = example_rows(schema.only(["user", "age"]), rows=1)
    own = example_rows(schema.only(["age", "price"]), rows=4)
    with pytest.raises(ValueError, match="candidates 2; the model reads 1 and 1"):
        create_model("lr", schema).eval().scores(Candidates.of(users, own))
