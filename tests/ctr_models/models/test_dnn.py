from __future__ import annotations

from typing import Any

import pytest
import torch

from ctr_models import CTRModel, Schema, create_model, example_batch
from ctr_models.export import export, tensors

SCHEMA = Schema.of({"user": 9, "item": 7}, dim=4)


def test_it_is_an_mlp_on_the_embedding() -> None:
    schema = Schema.of({"user": 9, "item": 7}, dim=4)
    model, batch = create_model("dnn", schema, mlp={"hidden": [6]}, embedding_std=1.0), example_batch(schema)
    assert torch.equal(model(batch), model.mlp(model.inputs.embedding(batch).flat).squeeze(1))
    assert sum(p.numel() for p in model.parameters()) == 16 * 4 + 8 * 6 + 6 + 6 + 1


def deep(**options: Any) -> CTRModel:
    torch.manual_seed(0)
    return create_model("dnn", SCHEMA, embedding_std=1.0, mlp={"hidden": [8, 6, 4]}, **options)


def test_a_gate_in_slot_depth_adds_exits_and_leaves_the_rest_its_name() -> None:
    plain, adaptive = deep(), deep(gates={"depth": "adaptive_depth"})
    added = set(adaptive.state_dict()) - set(plain.state_dict())
    assert set(plain.state_dict()) <= set(adaptive.state_dict())
    assert {name.split(".")[1] for name in added} == {"heads", "gates"}
    assert plain.exits is None


def test_rows_leave_early_when_it_predicts_and_all_programs_agree() -> None:
    model, batch = deep(gates={"depth": "adaptive_depth"}).eval(), example_batch(SCHEMA, rows=40)
    (x,) = model.inputs(batch)
    passage = model.exits(model.mlp, x)
    assert len(passage.exits().unique()) > 1
    torch.testing.assert_close(model(batch), passage.taken())
    torch.testing.assert_close(export(model).module()(*tensors(batch)), passage.taken())
    torch.testing.assert_close(model.loss(batch)[1], passage.taken())


def test_depth_has_its_price_in_the_loss() -> None:
    batch = example_batch(SCHEMA, rows=40)
    free, dear = (deep(gates={"depth": "adaptive_depth"}, exits={"cost": cost}) for cost in (0.0, 1.0))
    shares = dear.exits(dear.mlp, *dear.inputs(batch)).shares()
    price = (shares * shares.new_tensor(dear.exits.costs)).sum(1).mean()
    torch.testing.assert_close(dear.loss(batch)[0] - free.loss(batch)[0], price)


def test_telemetry_tells_each_exit_and_its_calibration() -> None:
    model = deep(gates={"depth": "adaptive_depth"}).train()
    told = model.telemetry(example_batch(SCHEMA, rows=40))
    assert {"exits.gates.0", "exits.total", "exits.0", "exits.1", "exits.2"} <= set(told)
    assert sum(told[f"exits.{i}"]["share"] for i in range(3)) == pytest.approx(1)
    assert all(0 <= told[f"exits.{i}"]["ece_all"] <= 1 for i in range(3))
    assert model.training
    with torch.no_grad():
        model.exits.gates[0].linear.bias.fill_(-100.0)  # nobody reaches the second gate
    assert "exits.gates.1" in model.telemetry(example_batch(SCHEMA, rows=4))
    assert "exits.total" not in deep().telemetry(example_batch(SCHEMA, rows=4))
