"""Slot ``selection``, which every model has: each gate of the slot, upon each model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ctr_models import (
    GATES,
    MODELS,
    CTRModel,
    DenseField,
    IdField,
    Schema,
    create_model,
    example_batch,
    example_rows,
)
from ctr_models.errors import ConfigError
from ctr_models.layers.selection import FixedSelection, SearchedSelection

DIM = 4
SCHEMA = Schema(
    dense=(DenseField(name="price", dim=DIM, role="item"),),
    sparse=(
        IdField(name="tags", rows=7, dim=DIM, kind="multi", max_length=4, role="item"),
        IdField(name="user", rows=12, dim=DIM, role="user"),
        IdField(name="item", rows=9, dim=DIM, role="item"),
        IdField(name="friend", rows=12, dim=DIM, table="user"),
    ),
    sequences=(
        IdField(name="history", rows=9, dim=DIM, table="item", kind="sequence", target="item", max_length=6),
    ),
)
every_model = pytest.mark.parametrize("name", list(MODELS))
every_gate = pytest.mark.parametrize("gate", [g for g in GATES if "selection" in GATES[g].slots and g != "none"])


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def make(name: str, *, seed: int = 0, **options: Any) -> CTRModel:
    torch.manual_seed(seed)
    return create_model(name, SCHEMA, embedding_std=0.3, **options)


@every_gate
def test_at_the_identity_the_model_is_the_control(gate: str) -> None:
    control = make("deepfm").eval()
    model = make("deepfm", gates={"selection": {"name": gate, "start": "identity"}}).eval()
    batch = example_batch(SCHEMA, rows=32)
    torch.testing.assert_close(model(batch), control(batch), rtol=0, atol=1e-6)


@every_gate
def test_gradients_reach_the_logits_and_every_other_weight(gate: str) -> None:
    model, batch = make("deepfm", gates={"selection": gate}), example_batch(SCHEMA, rows=256)
    model.loss(batch)[0].backward()
    for path, parameter in model.named_parameters():
        assert parameter.grad is not None, path
        assert parameter.grad.isfinite().all(), path
        assert parameter.grad.abs().max() > 0, path
    told = model.telemetry(batch)["selection.gate"]
    assert all(np.isfinite(v) for v in told.values())


@every_gate
def test_a_price_is_paid_for_values_outside_the_batch_too(gate: str) -> None:
    model = make("dnn", gates={"selection": {"name": gate, "penalty": 0.25}})
    assert isinstance(model.selection, SearchedSelection)
    values = 7 + 12 + 9
    logits = torch.cat([weight for weight in model.selection.tables().values()])
    assert logits.shape == (values, 1)
    torch.testing.assert_close(model.selection.penalty(), model.selection.gate.value_penalty(logits))
    batch = example_batch(SCHEMA, rows=2)
    loss, _ = model.loss(batch)
    plain = torch.nn.functional.binary_cross_entropy_with_logits(model(batch), batch.label)
    if not model.selection.gate.training or gate == "annealed":  # others draw anew
        torch.testing.assert_close(loss - plain, model.selection.penalty())


@every_model
def test_what_is_masked_out_has_no_weight_left(name: str) -> None:
    """Vectors of dropped values may be anything, in every embedding of the model, without moving a score."""
    random = torch.Generator().manual_seed(5)
    masks = {t: (torch.rand(f.rows, generator=random) < 0.5).float() for t, f in SCHEMA.tables.items()}
    model, batch = make(name).eval(), example_batch(SCHEMA, rows=64)
    plain = model(batch)
    model.select(FixedSelection(SCHEMA, masks))
    before = model.eval()(batch)
    assert not torch.allclose(before, plain)
    with torch.no_grad():
        for module in [m for m in model.modules() if type(m).__name__ == "FeatureEmbedding"]:
            for table, weight in module.tables().items():
                weight[masks[table] == 0] = 7.0
    torch.testing.assert_close(model(batch), before, rtol=0, atol=0)


@every_model
def test_masks_of_1_change_nothing(name: str) -> None:
    model, batch = make(name).eval(), example_batch(SCHEMA, rows=16)
    before = model(batch)
    model.select(FixedSelection(SCHEMA, {t: torch.ones(f.rows) for t, f in SCHEMA.tables.items()}))
    torch.testing.assert_close(model.eval()(batch), before, rtol=1e-5, atol=1e-6)


@every_model
def test_a_selecting_model_is_trained_in_one_seed_like_its_backbone(name: str) -> None:
    """The backbone's first weights don't depend on the selection, so they can be gone back to."""
    plain, selecting = make(name).state_dict(), make(name, gates={"selection": "annealed"})
    left = make(name, seed=3, gates={"selection": "annealed"}).load_state_dict(plain, strict=False)
    assert not left.unexpected_keys
    assert all(key.startswith("selection.") for key in left.missing_keys)
    own = {n: t for n, t in selecting.state_dict().items() if not n.startswith("selection.")}
    back = make(name, seed=3)
    back.load_state_dict(own)
    for key, tensor in back.state_dict().items():
        assert torch.equal(tensor, plain[key]), key


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    model, rows = make("deepfm", gates={"selection": "annealed"}).eval(), example_rows(SCHEMA, rows=6)
    assert isinstance(model.selection, SearchedSelection)
    with torch.no_grad():
        for weight in model.selection.tables().values():
            weight.normal_()
    alone = torch.cat([model(rows.batch(np.array([i]))) for i in range(len(rows))])
    torch.testing.assert_close(model(rows.batch()), alone, rtol=1e-5, atol=1e-6)


def test_each_value_of_a_field_has_its_own_mask() -> None:
    """Before pooling: the mean of a multi field counts dropped values as zeros."""
    from ctr_models import FeatureEmbedding

    torch.manual_seed(0)
    embedding, batch = FeatureEmbedding(SCHEMA, std=1.0), example_batch(SCHEMA, rows=40)
    masks = {t: torch.arange(f.rows) % 3 / 2 for t, f in SCHEMA.tables.items()}
    expected = FeatureEmbedding(SCHEMA, std=1.0)
    expected.load_state_dict(embedding.state_dict())
    with torch.no_grad():
        for table, weight in expected.tables().items():
            weight.mul_(masks[table].unsqueeze(1))
    embedding.mask(FixedSelection(SCHEMA, masks))
    found, wanted = embedding(batch), expected(batch)
    assert found.names == wanted.names
    torch.testing.assert_close(found.flat, wanted.flat)
    torch.testing.assert_close(found.sequences["history"].values(), wanted.sequences["history"].values())


def test_it_goes_without_values_to_select_and_wrong_gates() -> None:
    with pytest.raises(ConfigError, match="slot selection needs features with values"):
        create_model("dnn", Schema(dense=(DenseField(name="price"),)), gates={"selection": "annealed"})
    with pytest.raises(ConfigError, match="does not fit slot 'selection'"):
        create_model("dnn", SCHEMA, gates={"selection": "sigmoid2"})
    assert create_model("dnn", SCHEMA, gates={"selection": "none"}).selection is None
