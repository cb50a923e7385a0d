"""Candidates score what their plain rows score, in every registered model. Nothing here knows a model by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ctr_models import GATES, MODELS, Candidates, CTRModel, DenseField, IdField, Schema, create_model
from ctr_models.example import example_candidates, example_rows
from ctr_models.gates.context import ContextConfig
from kernels.dispatch import Operator

DIM = 4
SCHEMA = Schema(
    dense=(
        DenseField(name="age", dim=DIM, role="user"),
        DenseField(name="price", dim=DIM, role="item"),
        DenseField(name="hour", dim=DIM),
    ),
    sparse=(
        IdField(name="user", rows=12, dim=DIM, role="user", rank=3),
        IdField(name="item", rows=9, dim=DIM, role="item"),
        IdField(name="city", rows=5, dim=DIM),
        IdField(name="tags", rows=7, dim=DIM, kind="multi", max_length=4, role="item"),
        IdField(name="groups", rows=7, dim=DIM, kind="multi", max_length=4, role="user", table="tags"),
        IdField(name="friend", rows=12, dim=DIM, table="user", role="user", rank=3),
        IdField(name="user_item", rows=20, dim=DIM, of=("user", "item")),
    ),
    sequences=(
        IdField(name="clicks", rows=9, dim=DIM, table="item", kind="sequence", target="item", max_length=6),
        IdField(
            name="similar", rows=9, dim=DIM, table="item", kind="sequence", target="item", max_length=6, role="item"
        ),
    ),
)
every_model = pytest.mark.parametrize("name", list(MODELS))
GATED = [
    pytest.param(name, slot, gate, id=f"{name}-{slot}-{gate}")
    for name in MODELS
    for slot in MODELS[name].slots()
    for gate in GATES
    if slot in GATES[gate].slots
]
CONTEXTS = [
    pytest.param(slot, gate, context, tables, id=f"{slot}-{gate}-{context}-{tables}")
    for slot in ("feature", "field")
    for gate in GATES
    if slot in GATES[gate].slots and issubclass(GATES[gate].Config, ContextConfig)
    for context in ("self", "user", "item", "hour+city", "item+user")
    for tables in ("own", "shared")
]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def make(name: str, **options: Any) -> CTRModel:
    torch.manual_seed(0)
    return create_model(name, SCHEMA, embedding_std=0.3, **options).eval()


@torch.no_grad()
def scores_its_rows(model: CTRModel, candidates: Candidates) -> None:
    found = model.scores(candidates)
    assert found.shape == (len(candidates),)
    if len(candidates):
        torch.testing.assert_close(found, model(candidates.joined(SCHEMA)), rtol=1e-5, atol=1e-5)


@every_model
@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "plain"])
@pytest.mark.parametrize("counts", [[40], [1], [0, 1, 7, 0, 30], [1, 1, 1], [0]], ids=str)
def test_candidates_score_what_their_rows_score(name: str, kernels: bool, counts: list[int], monkeypatch) -> None:
    if not kernels:
        monkeypatch.setattr(Operator, "_choose", lambda *_: pytest.fail("an operator is not turned off"))
    scores_its_rows(make(name, kernels=kernels), example_candidates(SCHEMA, counts=counts))


@every_model
@pytest.mark.parametrize("shared", [{f.name for f in SCHEMA.fields}, {"similar", "tags", "price"}, set()])
def test_whoever_makes_the_candidates_says_what_is_shared(name: str, shared: set[str]) -> None:
    users = example_rows(SCHEMA.only(shared), rows=2)
    own = example_rows(SCHEMA.only({f.name for f in SCHEMA.fields} - shared), rows=5)
    scores_its_rows(make(name), Candidates.of(users, own, [2, 3]))


@pytest.mark.parametrize(("name", "slot", "gate"), GATED)
def test_with_each_gate(name: str, slot: str, gate: str) -> None:
    scores_its_rows(make(name, gates={slot: gate}), example_candidates(SCHEMA, counts=[3, 0, 4]))


@pytest.mark.parametrize(("slot", "gate", "context", "tables"), CONTEXTS)
def test_with_each_context(slot: str, gate: str, context: str, tables: str) -> None:
    gates = {slot: {"name": gate, "context": context, "tables": tables}}
    scores_its_rows(make("dnn", gates=gates), example_candidates(SCHEMA, counts=[3, 0, 4]))


@every_model
def test_a_model_that_trains_refuses(name: str) -> None:
    with pytest.raises(RuntimeError, match=r"call model.eval\(\)"):
        make(name).train().scores(example_candidates(SCHEMA))


@every_model
def test_there_are_no_gradients(name: str) -> None:
    assert not make(name).scores(example_candidates(SCHEMA)).requires_grad
