"""As a program a registered model gives the same scores. Nothing here knows a model by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ctr_models import GATES, MODELS, Batch, CTRModel, DenseField, IdField, Schema, create_model
from ctr_models.candidates import joined_rows
from ctr_models.errors import ConfigError
from ctr_models.example import example_batch, example_rows
from ctr_models.export import tensors
from ctr_models.program import CandidateScores, RowScores, candidate_tensors, filled, folded, traced

DIM = 4
SCHEMA = Schema(
    dense=(DenseField(name="age", dim=DIM, role="user"), DenseField(name="price", dim=DIM, role="item")),
    sparse=(
        IdField(name="user", rows=12, dim=DIM, role="user", rank=3),
        IdField(name="item", rows=9, dim=DIM, role="item"),
        IdField(name="hour", rows=5, dim=DIM),
        IdField(name="user_item", rows=20, dim=DIM, of=("user", "item")),
    ),
)
SHARED = {"age", "user", "hour"}
WIDE = {"mlp": {"hidden": [512, 512], "batch_norm": True}}
"""So wide that the products of some hundred rows go to oneDNN."""


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def make(name: str, **options: Any) -> CTRModel:
    """A model as it is after some steps: its batch norms have seen something."""
    torch.manual_seed(0)
    try:
        model = create_model(name, SCHEMA, embedding_std=0.3, **options)
    except ConfigError as error:
        pytest.skip(f"needs a history: {error}")
    with torch.no_grad():
        for seed in range(3):
            model(example_batch(SCHEMA, rows=64, seed=seed))
    return model.eval()


def probabilities(model: CTRModel, batch: Batch) -> torch.Tensor:
    with torch.inference_mode():
        return torch.sigmoid(model(batch))


SHARING = [name for name in MODELS if getattr(MODELS[name].forward, "takes_candidates", False)]
GATED = [
    pytest.param(name, {slot: gate}, id=f"{name}-{slot}-{gate}")
    for name in SHARING
    for slot in MODELS[name].default_gates
    for gate in GATES
    if slot in GATES[gate].slots
]


@pytest.mark.parametrize("name", list(MODELS))
def test_for_any_number_of_rows(name: str) -> None:
    model = make(name)
    program = traced(RowScores(folded(model)), tensors(example_batch(SCHEMA, rows=3)))
    for rows in (1, 2, 17, 300):
        batch = example_batch(SCHEMA, rows=rows, seed=rows)
        torch.testing.assert_close(program(*tensors(batch)), probabilities(model, batch), rtol=1e-5, atol=1e-6)


def scores_candidates(model: CTRModel) -> None:
    shared, own = SCHEMA.only(SHARED), SCHEMA.only({f.name for f in SCHEMA.fields} - SHARED)
    scores = CandidateScores(folded(model), shared, own)
    for traced_with, counts_of_all in (([3], ([1], [2], [17], [300])), ([3, 3], ([1, 1], [300, 0, 7, 1]))):
        given = candidate_tensors(
            example_rows(shared, rows=len(traced_with)), example_rows(own, rows=sum(traced_with)), traced_with
        )
        program = traced(scores, given)
        for counts in counts_of_all:
            users, rows = example_rows(shared, rows=len(counts)), example_rows(own, rows=sum(counts), seed=1)
            expected = probabilities(model, joined_rows(SCHEMA, users, rows, counts).batch())
            found = program(*candidate_tensors(users, filled(rows), counts))[: len(rows)]
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "gates"), GATED)
def test_of_candidates_of_one_user_and_of_several(name: str, gates: dict[str, str]) -> None:
    scores_candidates(make(name, gates=gates))


def test_of_layers_wide_enough_for_either_library() -> None:
    scores_candidates(make("dnn", **WIDE))
