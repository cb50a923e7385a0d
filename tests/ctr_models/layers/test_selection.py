"""Masks of feature values: looked up by table, for each value its own."""

from __future__ import annotations

import pytest
import torch

from ctr_models import IdField, Schema, create_model, example_batch
from ctr_models.export import export, tensors
from ctr_models.gates import GateSpec
from ctr_models.layers.selection import FixedSelection, SearchedSelection

SCHEMA = Schema(
    sparse=(
        IdField(name="tags", rows=7, dim=4, kind="multi", max_length=4),
        IdField(name="user", rows=12, dim=4),
        IdField(name="item", rows=9, dim=4),
        IdField(name="friend", rows=12, dim=4, table="user"),
    ),
    sequences=(IdField(name="seen", rows=9, dim=4, table="item", kind="sequence", max_length=5),),
)


def searched(**options: object) -> SearchedSelection:
    selection = SearchedSelection(SCHEMA, GateSpec(name="annealed", options=options))
    with torch.no_grad():
        for weight in selection.tables().values():
            weight.copy_(torch.linspace(-1, 1, len(weight)).unsqueeze(1))
    return selection


def test_logits_begin_where_the_gate_says() -> None:
    selection = SearchedSelection(SCHEMA, GateSpec(name="annealed", options={"initial": 0.25}))
    assert {t: tuple(w.shape) for t, w in selection.tables().items()} == {
        "user": (12, 1),
        "tags": (7, 1),
        "item": (9, 1),
    }
    assert all((w == 0.25).all() for w in selection.tables().values())


def test_each_value_has_the_mask_of_its_logit() -> None:
    selection, batch = searched(), example_batch(SCHEMA, rows=20)
    masks = selection(batch)
    ids = {**batch.sparse.to_dict(), **batch.sequences.to_dict()}
    assert masks.keys() == ids.keys()
    for f in (*SCHEMA.sparse, *SCHEMA.sequences):
        logits = selection.tables()[f.table][ids[f.name].values().long()]
        torch.testing.assert_close(masks[f.name], selection.gate.mask(logits))


def test_the_penalty_is_over_all_rows_each_table_once() -> None:
    selection = searched(penalty=0.5)
    every = torch.cat([torch.linspace(-1, 1, rows) for rows in (7, 12, 9)])
    torch.testing.assert_close(selection.penalty(), 0.5 * every.sigmoid().sum())
    selection.penalty().backward()
    for weight in selection.tables().values():
        assert weight.grad is not None
        assert (weight.grad > 0).all()


def test_decided_masks_are_those_of_the_hardened_gate() -> None:
    selection, batch = searched(initial=0.0), example_batch(SCHEMA, rows=20)
    masks = selection.decided()
    for table, mask in masks.items():
        torch.testing.assert_close(mask, 2.0 * (selection.tables()[table].flatten() > 0))
    fixed = FixedSelection(SCHEMA, masks)
    assert fixed.penalty() == 0
    for (name, one), other in zip(
        sorted(selection(batch).items()), [m for _, m in sorted(fixed(batch).items())], strict=True
    ):
        torch.testing.assert_close(one, other, msg=name)
    assert all(torch.equal(fixed.masks()[t], m) for t, m in masks.items())
    assert set(fixed.state_dict()) == {"masks0", "masks1", "masks2"}


def test_a_model_has_one_selection() -> None:
    model = create_model("dnn", SCHEMA, gates={"selection": "annealed"})
    with pytest.raises(ValueError, match="a selection already"):
        model.select(FixedSelection(SCHEMA, {t: torch.ones(f.rows) for t, f in SCHEMA.tables.items()}))


def test_a_selecting_model_exports() -> None:
    torch.manual_seed(0)
    schema = SCHEMA.only(["user", "item", "friend"])
    model = create_model("lr", schema, embedding_std=0.3, gates={"selection": "annealed"}).eval()
    program = export(model).module()
    for rows in (1, 7):
        batch = example_batch(schema, rows=rows, seed=rows)
        torch.testing.assert_close(program(*tensors(batch)), model(batch), rtol=1e-5, atol=1e-6)
