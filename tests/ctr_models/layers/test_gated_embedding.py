from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ctr_models import FeatureEmbedding, GateSpec, Schema, example_batch
from ctr_models.errors import ConfigError
from ctr_models.layers import GatedEmbedding
from ctr_models.schema import IdField

SCHEMA = Schema.of(
    {"user": 12, "age": 4, "item": 9, "hour": 5},
    dim=4,
    roles={"user": "user", "age": "user", "item": "item"},
)


class _Sigmoids(TorchDispatchMode):
    """Notes the shape of whatever a sigmoid is taken of."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if "sigmoid" in func.name():
            self.shapes.append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


def layer(streams: int = 1, schema: Schema = SCHEMA, **gates: Any) -> GatedEmbedding:
    torch.manual_seed(0)
    return GatedEmbedding(schema, {s: GateSpec.parse(g) for s, g in gates.items()}, std=0.5, streams=streams)


def test_without_gates_every_stream_is_the_embedding_itself() -> None:
    inputs, batch = layer(streams=2), example_batch(SCHEMA, rows=3)
    embedded = inputs.embedding(batch)
    assert all(x is embedded.flat for x in inputs.gated(batch, embedded))


def test_each_stream_has_its_own_context_in_its_own_tables() -> None:
    inputs = layer(streams=2, feature={"name": "sigmoid2", "context": ["user", "item"], "hidden": [8]})
    assert [c.width for c in inputs.contexts] == [8, 4]
    names = [set(m.table_of) for m in inputs.modules() if isinstance(m, FeatureEmbedding)]
    assert names == [set(SCHEMA.tables), {"context1_user", "context1_age"}, {"context2_item"}]


def test_shared_context_has_no_tables_and_the_same_vectors() -> None:
    gate = {"name": "sigmoid2", "context": "item+hour", "tables": "shared"}
    inputs, batch = layer(feature=gate), example_batch(SCHEMA, rows=3)
    assert sum(isinstance(m, FeatureEmbedding) for m in inputs.modules()) == 1
    embedded = inputs.embedding(batch)
    context = inputs.contexts[0](batch, embedded)
    assert torch.equal(context, torch.cat([embedded.field("item"), embedded.field("hour")], dim=1))


def test_the_mask_of_a_learned_context_is_made_once_a_batch() -> None:
    inputs, batch = layer(feature="sigmoid2"), example_batch(SCHEMA, rows=50)
    with _Sigmoids() as sigmoids:
        (x,) = inputs(batch)
    assert x.shape == (50, 16) and sigmoids.shapes == [(1, 16)]
    for one in inputs.feature_gates:
        one.fused = False
    with _Sigmoids() as sigmoids:
        inputs(batch)
    assert sigmoids.shapes == [(1, 16)]


def test_the_field_gate_scales_whole_fields() -> None:
    inputs, batch = layer(field={"name": "squeeze_excite"}), example_batch(SCHEMA, rows=3)
    embedded = inputs.embedding(batch)
    (x,) = inputs.gated(batch, embedded)
    ratio = (x / embedded.flat).view(3, 4, 4)
    torch.testing.assert_close(ratio, ratio[:, :, :1].expand_as(ratio))


@pytest.mark.parametrize(
    ("schema", "gates", "message"),
    [
        (SCHEMA, {"feature": {"name": "sigmoid2", "context": "usr"}}, "no field 'usr'.*did you mean 'user'"),
        (Schema.of({"a": 3}), {"feature": {"name": "sigmoid2", "context": "user"}}, "no field has role 'user'"),
        (
            SCHEMA,
            {"feature": {"name": "sigmoid2", "context": ["user", "item"]}},
            "2 entries, the model has 1",
        ),
        (
            Schema(sparse=(IdField(name="a", rows=3, dim=4), IdField(name="b", rows=3, dim=8))),
            {"field": "squeeze_excite"},
            "a field gate needs fields of one dimension, found {'a': 4, 'b': 8}",
        ),
    ],
)
def test_what_cannot_be_gated_is_explained(schema: Schema, gates: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        layer(schema=schema, **gates)
