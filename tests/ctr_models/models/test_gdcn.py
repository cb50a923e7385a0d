from __future__ import annotations

from typing import Any

import pytest
import torch

from ctr_models import CTRModel, Schema, create_model, example_batch

SCHEMA = Schema.of({"user": 12, "item": 9, "hour": 5}, dim=4)
MLP = {"hidden": [8, 6]}


def make(name: str, **options: Any) -> CTRModel:
    torch.manual_seed(0)
    return create_model(name, SCHEMA, embedding_std=0.5, mlp=MLP, **options).eval()


@pytest.mark.parametrize("form", ["parallel", "stacked", "cross_only"])
def test_without_its_gate_it_is_dcnv2(form: str) -> None:
    ungated, dcnv2 = make("gdcn", form=form, gates={"cross": "none"}), make("dcnv2", form=form)
    dcnv2.load_state_dict(ungated.state_dict())
    batch = example_batch(SCHEMA, rows=7)
    assert torch.equal(ungated(batch), dcnv2(batch))
    assert not torch.equal(make("gdcn", form=form)(batch), dcnv2(batch))


@pytest.mark.parametrize("gate", ["none", "sigmoid"])
@pytest.mark.parametrize("form", ["parallel", "stacked", "cross_only"])
def test_each_form_is_its_equation(form: str, gate: str) -> None:
    model, batch = make("gdcn", form=form, cross_layers=2, gates={"cross": gate}), example_batch(SCHEMA, rows=7)
    c0 = c = model.inputs.embedding(batch).flat
    for crossing, g in zip(model.cross.linears, model.cross.gates, strict=True):
        mask = torch.sigmoid(c @ g.linear.weight.T) if gate == "sigmoid" else 1
        c = c0 * (c @ crossing.weight.T + crossing.bias) * mask + c
    top = {
        "parallel": lambda: torch.cat([c, model.mlp(c0)], dim=1),
        "stacked": lambda: model.mlp(c),
        "cross_only": lambda: c,
    }[form]()
    torch.testing.assert_close(model(batch), model.head(top).squeeze(1))


def test_parameter_count() -> None:
    d, rows = 12, 26
    model = make("gdcn", cross_layers=3)
    expected = 4 * rows + 3 * (2 * d * d + d) + (d * 8 + 8) + (8 * 6 + 6) + (d + 6 + 1)
    assert sum(p.numel() for p in model.parameters()) == expected


def test_published_parameter_count_on_criteo() -> None:
    """19.73 million in the paper for the cross network alone: 1,086,810 features of 16, 39 fields, 3 layers."""
    d = 39 * 16
    assert 1_086_810 * 16 + 3 * (2 * d * d + d) + d + 1 == pytest.approx(19.73e6, rel=1e-3)
    small = Schema.of({f"c{i}": 2 for i in range(39)}, dim=16)
    model = create_model("gdcn", small, form="cross_only")
    assert sum(p.numel() for p in model.parameters()) == 39 * 2 * 16 + 3 * (2 * d * d + d) + d + 1


def test_openness_tells_each_order_and_field_apart() -> None:
    model, batch = make("gdcn", cross_layers=3), example_batch(SCHEMA, rows=7)
    with torch.no_grad():
        for layer, gate in enumerate(model.cross.gates):
            gate.linear.weight.zero_()
            gate.linear.weight[:4, layer] = 1e4 * (1 if layer == 1 else -1)
    c0 = model.inputs.embedding(batch).flat
    told = model.openness(batch)
    assert list(told) == [2, 3, 4]
    assert all(list(fields) == ["user", "item", "hour"] for fields in told.values())
    assert told[2]["user"] == pytest.approx((c0[:, 0] < 0).float().mean().item(), abs=1e-3)
    assert told[3]["user"] != told[2]["user"]
    assert all(fields[name] == 0.5 for fields in told.values() for name in ("item", "hour"))


def test_openness_leaves_the_model_as_it_was() -> None:
    model = make("gdcn").train()
    model.openness(example_batch(SCHEMA, rows=3))
    assert model.training
