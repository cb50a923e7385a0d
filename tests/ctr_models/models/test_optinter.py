from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

from ctr_models import CTRModel, FeatureEmbedding, IdField, Schema, create_model, example_batch
from ctr_models.errors import ConfigError
from ctr_models.export import export, tensors
from ctr_models.models.optinter import TREATMENTS, OptInter

D, P_DIM = 4, 4
PLAIN = Schema.of({"user": 12, "item": 9, "hour": 5}, dense=["price"], dim=D)
CROSSES = (
    # Named against the order of the fields, and out of order: pairs go by name, never by position.
    IdField(name="hour_x_user", rows=30, dim=D, of=("hour", "user")),
    IdField(name="user_x_item", rows=40, dim=D, of=("user", "item")),
    IdField(name="all_three", rows=50, dim=D, of=("user", "item", "hour")),
)
SCHEMA = PLAIN.model_copy(update={"sparse": (CROSSES[0], *PLAIN.sparse, *CROSSES[1:])})
BATCH = example_batch(SCHEMA, rows=7)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def make(schema: Schema = SCHEMA, *, gate: Any = "none", **options: Any) -> OptInter:
    torch.manual_seed(0)
    gates = {"interaction": gate}
    settings = {"mlp": {"hidden": [8]}, "pair_dim": P_DIM, "embedding_std": 0.5, **options}
    model = create_model("optinter", schema, gates=gates, **settings)
    assert isinstance(model, OptInter)
    return model.eval()


def vectors(model: CTRModel, embedding: FeatureEmbedding | None, name: str) -> Tensor:
    assert embedding is not None
    return embedding(BATCH).field(name)


def tables(model: CTRModel) -> set[str]:
    return {t for m in model.modules() if isinstance(m, FeatureEmbedding) for t in m.table_of}


def test_the_search_is_its_equation() -> None:
    model = make()
    with torch.no_grad():
        model.logits.copy_(torch.randn_like(model.logits))
    paired = ["price", "user", "item", "hour"]
    assert sorted(map(sorted, model.pairs)) == sorted(map(sorted, combinations(paired, 2)))
    crosses = {frozenset({"hour", "user"}): "hour_x_user", frozenset({"user", "item"}): "user_x_item"}
    parts = [model.inputs.embedding(BATCH).flat]
    for pair, logits in zip(model.pairs, model.logits, strict=True):
        left, right = (vectors(model, model.factors, name) for name in pair)
        cross = crosses.get(frozenset(pair))
        if cross is None:
            p = torch.cat([torch.zeros(1), logits[1:].softmax(0)])
            memorised = torch.zeros(())
        else:
            p, memorised = logits.softmax(0), vectors(model, model.memory, cross)
        parts.append(p[0] * memorised + p[1] * left * right)
    torch.testing.assert_close(model(BATCH), model.mlp(torch.cat(parts, dim=1)).squeeze(1))


def test_picked_it_is_its_equation_and_holds_nothing_else() -> None:
    model = make(memorise=[["user", "hour"]], factorise=[["price", "item"], ["item", "hour"]], gate="gumbel")
    memorised = vectors(model, model.memory, "hour_x_user")
    v = {name: vectors(model, model.factors, name) for name in ("price", "item", "hour")}
    parts = [model.inputs.embedding(BATCH).flat, memorised, v["price"] * v["item"], v["item"] * v["hour"]]
    torch.testing.assert_close(model(BATCH), model.mlp(torch.cat(parts, dim=1)).squeeze(1))
    assert model.gate is None
    assert {id(g) for g in model.gates()} == {id(model.inputs.field_gate), id(model.inputs.feature_gates[0])}
    assert tables(model) == {
        *("user", "item", "hour", "all_three"),
        *("factor_item", "factor_hour"),
        "memory_hour_x_user",
    }
    width = 5 * D + 3 * P_DIM
    expected = D * (12 + 9 + 5 + 50 + 1) + P_DIM * (9 + 5 + 1 + 30) + (width * 8 + 8) + (8 + 1)
    assert sum(p.numel() for p in model.parameters()) == expected


def test_pairs_that_do_not_interact_leave_a_perceptron() -> None:
    model = make(memorise=[], factorise=[])
    torch.testing.assert_close(model(BATCH), model.mlp(model.inputs.embedding(BATCH).flat).squeeze(1))
    assert model.choices() == {}


def test_memorising_is_not_on_offer_without_a_cross() -> None:
    model = make(PLAIN)
    assert model.memory is None
    assert all(share == {"memorise": 0.0, "factorise": 0.5, "nothing": 0.5} for share in model.choices().values())
    batch = example_batch(PLAIN, rows=64)
    for gate in ("none", "gumbel", "softmax"):
        model = make(PLAIN, gate=gate).train()
        model.loss(batch)[0].backward()
        assert (model.weights()[:, 0] == 0).all(), gate
        assert (model.logits.grad[:, 0] == 0).all(), gate
        assert (model.logits.grad[:, 1].abs() > 0).all(), gate


def test_the_gate_weighs_and_its_noise_ends_with_training() -> None:
    model = make(gate={"name": "gumbel", "temperature": 1.0})
    plain = make(gate="none")
    assert torch.equal(model(BATCH), plain(BATCH))
    model.train()
    assert not torch.equal(model(BATCH), model(BATCH))
    told = model.telemetry(BATCH)["gate"]
    assert {"mean", "entropy"} <= set(told)


def test_choices_are_those_of_the_logits() -> None:
    model = make(gate="gumbel")
    pair = next(p for p in model.pairs if set(p) == {"user", "item"})
    with torch.no_grad():
        model.logits[model.pairs.index(pair)] = torch.tensor([2.0, 1.0, 0.0])
    shares = torch.tensor([2.0, 1.0, 0.0]).softmax(0).tolist()
    assert model.choices()[pair] == pytest.approx(dict(zip(TREATMENTS, shares, strict=True)))
    picked = make(memorise=[["item", "user"]], factorise=[["hour", "item"]])
    assert picked.choices() == {
        ("item", "user"): {"memorise": 1.0, "factorise": 0.0, "nothing": 0.0},
        ("hour", "item"): {"memorise": 0.0, "factorise": 1.0, "nothing": 0.0},
    }


@pytest.mark.parametrize("gate", ["gumbel", "none"])
def test_a_pick_gives_each_pair_one_treatment_with_weight_1(gate: str) -> None:
    torch.manual_seed(0)
    model = make(gate=gate).eval()
    best = {pair: max(share, key=share.__getitem__) for pair, share in model.choices().items()}
    best[model.pairs[0]] = "factorise"
    model.pick(best)
    expected = [[float(best[pair] == one) for one in TREATMENTS] for pair in model.pairs]
    assert torch.equal(model.weights(), torch.tensor(expected))
    assert model.choices()[model.pairs[0]]["factorise"] == 1.0


def test_factors_and_memory_start_on_one_scale() -> None:
    schema = Schema(
        sparse=(
            IdField(name="a", rows=400, dim=8),
            IdField(name="b", rows=400, dim=8),
            IdField(name="a_x_b", rows=400, dim=8, of=("a", "b")),
        )
    )
    model, batch = make(schema, pair_dim=16, pair_std=0.3), example_batch(schema, rows=2000)
    assert model.factors is not None
    v = model.factors(batch).stacked().detach()
    product, memorised = (v[:, 0] * v[:, 1]).std(), model.memory(batch).flat.detach().std()
    assert float(product) == pytest.approx(0.09, rel=0.1)
    assert float(memorised) == pytest.approx(0.09, rel=0.1)


def test_a_search_prefers_what_explains_the_label() -> None:
    """The label is a coin flip for each combination: only memory can know it."""
    torch.manual_seed(0)
    schema = Schema(
        sparse=(
            *Schema.of({"a": 16, "b": 16, "c": 16}, dim=4).sparse,
            *(IdField(name=x + y, rows=256, dim=4, of=(x, y)) for x, y in ("ab", "ac", "bc")),
        )
    )
    ids = torch.randint(0, 16, (3, 2048))
    pairs = torch.stack([ids[0] * 16 + ids[1], ids[0] * 16 + ids[2], ids[1] * 16 + ids[2]])
    batch = example_batch(schema, rows=2048)
    batch.sparse.values()[:] = torch.cat([ids, pairs]).flatten().int()
    batch.label[:] = torch.randint(0, 2, (256,))[pairs[0]].float()
    model = make(schema, gate="gumbel", embedding_std=0.01).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        model.loss(batch)[0].backward()
        optimizer.step()
    found = {pair: max(share, key=share.__getitem__) for pair, share in model.choices().items()}
    assert found[("a", "b")] == "memorise"
    assert model.choices()[("a", "b")]["memorise"] > 0.5


@pytest.mark.parametrize("options", [{}, {"memorise": [["user", "item"]], "factorise": [["price", "hour"]]}])
def test_exported_with_crosses_it_is_the_same(options: dict[str, Any]) -> None:
    model = make(gate="gumbel", **options)
    program = export(model).module()
    for rows in (1, 5):
        batch = example_batch(SCHEMA, rows=rows, seed=rows)
        torch.testing.assert_close(program(*tensors(batch)), model(batch))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memorise": [["user", "hourr"]]}, r"model.memorise: 'hourr' is no field .* did you mean 'hour'"),
        ({"factorise": [["user", "all_three"]]}, r"model.factorise: 'all_three' is no field that can be paired"),
        (
            {"memorise": [["item", "hour"]]},
            r"model.memorise: no column is the cross of 'item' and 'hour'\. "
            r"add \{name: item_x_hour, kind: cross, of: \[item, hour\]\} to features.columns",
        ),
        ({"memorise": [["user", "user"]]}, r"the pair \['user', 'user'\] is one field"),
        (
            {"memorise": [["user", "item"]], "factorise": [["item", "user"]]},
            r"the pair \['item', 'user'\] appears twice",
        ),
    ],
)
def test_what_can_not_be_paired_is_said(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**options)


def test_one_field_has_no_pairs() -> None:
    with pytest.raises(ConfigError, match="optinter needs two fields or more"):
        make(Schema.of({"user": 4}))


def test_a_context_names_fields_and_no_crosses() -> None:
    gate = {"name": "sigmoid2", "context": "context", "tables": "shared"}
    model = create_model("optinter", SCHEMA, gates={"feature": gate})
    assert model.inputs.contexts[0].names == ("price", "user", "item", "hour", "all_three")
