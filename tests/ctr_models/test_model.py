from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ctr_models import (
    Batch,
    CTRModel,
    Gate,
    GateConfig,
    GateShape,
    GateSpec,
    IdField,
    ModelConfig,
    ModelSpec,
    Schema,
    create_model,
    example_batch,
)
from ctr_models.errors import ConfigError

SCHEMA = Schema.of({"user": 12, "item": 9}, dim=4, roles={"user": "user"})


def test_a_spec_is_read_and_written() -> None:
    given = {"name": "gdcn", "cross_layers": 2, "mlp": {"hidden": [8]}, "gates": {"cross": {"name": "none"}}}
    spec = ModelSpec.parse(given)
    assert spec.to_dict() == given
    assert ModelSpec.parse(spec) is spec
    assert ModelSpec.parse("dnn").to_dict() == {"name": "dnn"}
    assert {slot: gate.name for slot, gate in spec.all_gates.items()} == {
        "cross": "none",
        "field": "none",
        "feature": "none",
    }


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("gdnc", r"unknown model 'gdnc'. did you mean 'gdcn'"),
        ({"cross_layers": 3}, r"^model: a model needs a name"),
        ({"name": "gdcn", "cross_layer": 3}, r"^model.cross_layer: unknown key. did you mean 'cross_layers'"),
        ({"name": "gdcn", "gatez": {}}, r"^model.gatez: unknown key. did you mean 'gates'"),
        ({"name": "gdcn", "cross_layers": 0}, r"^model.cross_layers: must be at least 1, got 0"),
        ({"name": "gdcn", "form": "paralel"}, r"^model.form: unknown value 'paralel'. did you mean 'parallel'"),
        ({"name": "gdcn", "mlp": {"hiden": [3]}}, r"^model.mlp.hiden: unknown key. did you mean 'hidden'"),
        ({"name": "dnn", "mlp": {"dropout": 1.5}}, r"^model.mlp.dropout: must be less than 1, got 1.5"),
        ({"name": "gdcn", "gates": "sigmoid"}, r"^model.gates: expected slot: gate"),
        ({"name": "gdcn", "gates": {"cros": "none"}}, r"^model.gates.cros: .*did you mean 'cross'"),
        ({"name": "gdcn", "gates": {"cross": "sigmod"}}, r"unknown gate 'sigmod'. did you mean 'sigmoid'"),
        (
            {"name": "gdcn", "gates": {"cross": {"name": "none", "strt": 1}}},
            r"^model.gates.cross.strt: unknown",
        ),
    ],
)
def test_a_wrong_spec_is_explained(given: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelSpec.parse(given)


def test_a_gate_in_a_slot_that_it_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="gate 'sigmoid2' does not fit slot 'cross'"):
        create_model("gdcn", SCHEMA, gates={"cross": "sigmoid2"})


class _Costly(Gate):
    """A gate that asks for a penalty of 3."""

    name = "costly"
    slots = frozenset({"feature"})

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return x.new_ones(1, 1)

    def penalty(self) -> Tensor:
        return torch.tensor(3.0)


class _Constant(CTRModel):
    def __init__(self, config: ModelConfig, schema: Schema, gates: Mapping[str, GateSpec]) -> None:
        super().__init__(config, schema, gates)
        self.gate = _Costly(GateConfig(), GateShape(slot="feature", width=1))

    def forward(self, batch: Batch) -> Tensor:
        return torch.full((len(batch),), 0.5)


def test_the_loss_is_cross_entropy_plus_penalties() -> None:
    batch = example_batch(SCHEMA, rows=6)
    loss, logits = _Constant(ModelConfig(), SCHEMA, {}).loss(batch)
    expected = F.binary_cross_entropy(torch.sigmoid(logits), batch.label)
    torch.testing.assert_close(loss, expected + 3)


def test_telemetry_tells_of_every_gate_and_leaves_the_model_as_it_was() -> None:
    model = create_model("finalmlp", SCHEMA, gates={"feature": {"name": "sigmoid2", "start": "identity"}}).train()
    batch = example_batch(SCHEMA, rows=6)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    told = model.telemetry(batch)
    assert told["inputs.feature_gates.0"]["mean"] == pytest.approx(1)
    assert told["inputs.feature_gates.1"]["entropy"] == pytest.approx(1)
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all("gated" not in vars(gate) and not gate._forward_hooks for gate in model.gates())


@pytest.mark.parametrize("start", ["paper", "identity"])
def test_telemetry_tells_of_the_gate_of_every_cross_layer(start: str) -> None:
    gate = {"name": "sigmoid", "start": start}
    model = create_model("gdcn", SCHEMA, cross_layers=2, gates={"cross": gate}).eval()
    batch = example_batch(SCHEMA, rows=6)
    told = model.telemetry(batch)
    masks = model.cross.masks(model.inputs(batch)[0])
    means = [told[f"cross.gates.{depth}"]["mean"] for depth in range(2)]
    assert means == pytest.approx([float(mask.detach().mean()) for mask in masks])
    assert all(not {"cross", "cross_network"} & set(vars(gate)) for gate in model.gates())


def test_telemetry_tells_of_what_gates_do_beside_their_mask() -> None:
    even = create_model("autoint", SCHEMA, gates={"attention": {"name": "clipped_softmax", "alpha": 10.0}})
    told = even.telemetry(example_batch(SCHEMA, rows=6))
    assert [one["zeros"] for path, one in told.items() if ".gate" in path] == [1.0] * 3, "no head does anything"
    history = IdField(name="history", rows=9, dim=4, table="item", kind="sequence", target="item", max_length=6)
    schema = Schema(sparse=SCHEMA.sparse, sequences=(history,))
    din = create_model("din", schema, gates={"sequence": "recency"})
    (share,) = (
        one["mean"] for path, one in din.telemetry(example_batch(schema, rows=6)).items() if "interest" in path
    )
    assert share == pytest.approx(torch.sigmoid(torch.tensor(1.0)).item())
    assert all(not {"attend", "pool", "gated"} & set(vars(gate)) for model in (even, din) for gate in model.gates())


def test_a_dotted_path_finds_a_model() -> None:
    assert type(create_model("ctr_models.models.dnn.DNN", SCHEMA)).__name__ == "DNN"
    with pytest.raises(ConfigError, match=r"can't import model 'ctr_models.models.nowhere.DNN'"):
        create_model("ctr_models.models.nowhere.DNN", SCHEMA)
