"""What every registered model must hold, with every gate in every slot. Nothing here knows a model by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ctr_models import (
    GATES,
    MODELS,
    CTRModel,
    DenseField,
    EncodedRows,
    FeatureEmbedding,
    IdField,
    Ragged,
    Schema,
    create_model,
    example_batch,
    example_rows,
)
from ctr_models.errors import ConfigError
from ctr_models.export import TensorModel, export, tensors
from kernels.dispatch import Operator

DIM = 4
PLAIN = Schema.of({"user": 12, "item": 9, "hour": 5}, dim=DIM, roles={"user": "user", "item": "item"})
MIXED = Schema(
    dense=(DenseField(name="price", dim=DIM, role="item"), DenseField(name="age", dim=DIM, role="user")),
    sparse=(
        IdField(name="user", rows=12, dim=DIM, role="user"),
        IdField(name="item", rows=9, dim=DIM, role="item"),
        IdField(name="tags", rows=7, dim=DIM, kind="multi", max_length=4, role="item"),
        IdField(name="friend", rows=12, dim=DIM, table="user"),
    ),
    sequences=(
        IdField(name="history", rows=9, dim=DIM, table="item", kind="sequence", target="item", max_length=6),
    ),
)
every_model = pytest.mark.parametrize("name", list(MODELS))
every_schema = pytest.mark.parametrize("schema", [PLAIN, MIXED], ids=["plain", "mixed"])
GATED = [
    pytest.param(name, slot, gate, id=f"{name}-{slot}-{gate}")
    for name in MODELS
    for slot in MODELS[name].default_gates
    for gate in GATES
    if slot in GATES[gate].slots
]
STARTED = [p for p in GATED if "identity" in get_args(GATES[p.values[2]].Config.model_fields["start"].annotation)]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def make(name: str, schema: Schema, *, seed: int = 0, **options: Any) -> CTRModel:
    torch.manual_seed(seed)
    return create_model(name, schema, embedding_std=0.3, **options)


@every_model
@every_schema
def test_a_batch_gives_a_logit_a_row(name: str, schema: Schema) -> None:
    logits = make(name, schema)(example_batch(schema, rows=6))
    assert logits.shape == (6,)
    assert logits.dtype == torch.float32
    assert logits.isfinite().all()


@every_model
@every_schema
def test_kernels_compute_what_their_definitions_do(name: str, schema: Schema, monkeypatch) -> None:
    batch = example_batch(schema, rows=33)
    results = []
    for kernels in (True, False):
        if not kernels:
            monkeypatch.setattr(Operator, "_choose", lambda *_: pytest.fail("an operator is not turned off"))
        model = make(name, schema, kernels=kernels)
        model.train(False)
        loss, logits = model.loss(batch)
        loss.backward()
        results.append((logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (fast, slopes), (plain, expected) = results
    torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-5)
    assert slopes.keys() == expected.keys()
    for path, slope in slopes.items():
        torch.testing.assert_close(slope, expected[path], rtol=1e-4, atol=1e-5, msg=lambda m, p=path: f"{p}: {m}")


@every_model
@every_schema
def test_gradients_reach_every_parameter(name: str, schema: Schema) -> None:
    model = make(name, schema)
    loss, logits = model.loss(example_batch(schema, rows=64))
    loss.backward()
    assert loss.shape == ()
    assert logits.shape == (64,)
    for path, parameter in model.named_parameters():
        assert parameter.grad is not None, path
        assert parameter.grad.isfinite().all(), path
        assert parameter.grad.abs().max() > 0, path


@every_model
@every_schema
def test_it_learns(name: str, schema: Schema) -> None:
    model, batch = make(name, schema), example_batch(schema, rows=64)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    before = model.loss(batch)[0].item()
    for _ in range(30):
        optimizer.zero_grad()
        loss = model.loss(batch)[0]
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.9 * before


@every_model
def test_one_seed_gives_one_model(name: str) -> None:
    batch = example_batch(MIXED, rows=6)
    assert torch.equal(make(name, MIXED).eval()(batch), make(name, MIXED).eval()(batch))


@every_model
def test_a_row_does_not_depend_on_its_neighbours(name: str) -> None:
    model, rows = make(name, MIXED).eval(), example_rows(MIXED, rows=6)
    alone = torch.cat([model(rows.batch(np.array([i]))) for i in range(len(rows))])
    torch.testing.assert_close(model(rows.batch()), alone, rtol=1e-5, atol=1e-6)


@every_model
def test_a_row_without_a_single_value_has_a_score(name: str) -> None:
    nothing = Ragged(np.empty(0, np.int32), np.zeros(3, np.int64))
    rows = EncodedRows(
        schema=MIXED,
        dense=np.zeros((2, 2), np.float32),
        single=np.zeros((3, 2), np.int32),
        ragged={"tags": nothing, "history": nothing},
        label=np.zeros(2, np.float32),
        group=np.zeros(2, np.int64),
    )
    model = make(name, MIXED)
    loss, _ = model.loss(rows.batch())
    loss.backward()
    first, second = model.eval()(rows.batch())
    torch.testing.assert_close(first, second)
    assert first.isfinite()


@every_model
def test_an_empty_history_is_one_vector_of_zeros(name: str) -> None:
    model, rows = make(name, MIXED).eval(), example_rows(MIXED, rows=12)
    empty = np.flatnonzero(np.diff(rows.ragged["history"].offsets) == 0)
    assert len(empty)
    assert model(rows.batch(empty)).isfinite().all()


@every_model
def test_it_survives_saving(name: str, tmp_path: Path) -> None:
    model, fresh, batch = make(name, MIXED), make(name, MIXED, seed=1), example_batch(MIXED, rows=6)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    fresh.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    assert torch.equal(model.eval()(batch), fresh.eval()(batch))


@every_model
def test_every_table_is_a_collection_of_torchrec(name: str) -> None:
    model = make(name, MIXED)
    embeddings = [m for m in model.modules() if isinstance(m, FeatureEmbedding)]
    assert embeddings
    tables = {id(p) for m in embeddings for p in m.table_parameters()}
    lookups = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding | torch.nn.EmbeddingBag)}
    assert tables == lookups
    assert {t for m in embeddings for t in m.table_of.values()} == set(MIXED.tables)


@every_model
def test_exported_it_is_the_same_for_any_number_of_rows(name: str) -> None:
    model = make(name, MIXED).eval()
    program = export(model).module()
    for rows in (1, 3, 11):
        batch = example_batch(MIXED, rows=rows, seed=rows)
        torch.testing.assert_close(program(*tensors(batch)), model(batch), rtol=1e-5, atol=1e-6)


@every_model
def test_compiled_it_is_the_same(name: str) -> None:
    """On the other schema: tracing is what takes the time of this suite, and both ways trace alike."""
    torch._dynamo.reset()
    model, batch = make(name, PLAIN).eval(), example_batch(PLAIN, rows=6)
    compiled = torch.compile(TensorModel(model), backend="aot_eager", dynamic=False)
    torch.testing.assert_close(compiled(*tensors(batch)), model(batch), rtol=1e-5, atol=1e-6)


@every_model
def test_mixed_precision_is_near_and_trains(name: str) -> None:
    model, batch = make(name, MIXED), example_batch(MIXED, rows=64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = model.loss(batch)
        loss.backward()
        assert loss.dtype == torch.float32
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        rough = model.eval()(batch).float()
    torch.testing.assert_close(rough, model(batch), rtol=0.05, atol=0.05)


@every_model
def test_a_misspelt_option_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=r"^model.embeding_std: unknown key.*did you mean 'embedding_std'"):
        create_model(name, PLAIN, embeding_std=1)


@every_model
def test_an_unknown_slot_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"model.gates.crosss: model '{name}' has no gate slot 'crosss'"):
        create_model(name, PLAIN, gates={"crosss": "sigmoid"})


@pytest.mark.parametrize(("name", "slot", "gate"), GATED)
def test_each_gate_that_fits_a_slot_works_in_it(name: str, slot: str, gate: str) -> None:
    model, batch = make(name, MIXED, gates={slot: gate}), example_batch(MIXED, rows=64)
    assert model.gate_specs[slot].name == gate
    loss, logits = model.loss(batch)
    loss.backward()
    assert logits.shape == (64,)
    assert logits.isfinite().all()
    for path, parameter in model.named_parameters():
        assert parameter.grad is not None, path
        assert parameter.grad.isfinite().all(), path
        assert parameter.grad.abs().max() > 0, path
    for told in model.telemetry(batch).values():
        assert all(np.isfinite(v) for v in told.values())


@pytest.mark.parametrize(("name", "slot", "gate"), STARTED)
def test_a_challenger_that_starts_as_the_identity_begins_as_the_control(name: str, slot: str, gate: str) -> None:
    others = {s: "none" for s in MODELS[name].default_gates}
    control = make(name, MIXED, gates=others).eval()
    challenger = make(name, MIXED, seed=1, gates={**others, slot: {"name": gate, "start": "identity"}}).eval()
    left = challenger.load_state_dict(control.state_dict(), strict=False)
    assert not left.unexpected_keys
    batch = example_batch(MIXED, rows=6)
    torch.testing.assert_close(challenger(batch), control(batch), rtol=0, atol=1e-6)
