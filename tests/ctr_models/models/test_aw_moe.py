from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ctr_models import GATES, CTRModel, Gate, IdField, Schema, create_model, example_batch
from ctr_models.errors import ConfigError
from ctr_models.layers.contrast import contrastive_loss, masked_view, spread


def field(name: str, *, table: str = "", target: str | None = None) -> IdField:
    kind = "sequence" if table else "categorical"
    return IdField(name=name, rows=9, dim=4, table=table, kind=kind, target=target, max_length=6)


ITEM, SHOP = field("item"), field("shop")
CLICKS, VISITS = field("clicks", table="item", target="item"), field("visits", table="shop", target="shop")
SCHEMA = Schema(sparse=(ITEM,), sequences=(CLICKS,))
TWO = Schema(sparse=(ITEM, SHOP), sequences=(CLICKS, VISITS))


class Counting(Gate):
    """weights = a linear map of the sum of the behaviours; remembers what it saw."""

    slots = frozenset({"expert"})

    def __init__(self, config: Any, shape: Any) -> None:
        super().__init__(config, shape)
        self.linear = nn.Linear(shape.context or shape.width, shape.choices)
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.linear(x)

    def mixture(self, x: Tensor, values: Tensor, offsets: Tensor, query: Tensor) -> Tensor:
        self.seen.append((values, offsets))
        rows = torch.repeat_interleave(offsets.diff(), output_size=len(values))
        return self.linear(torch.zeros_like(query).index_add(0, rows, values))


class Alone(Counting):
    """Looks at the row only."""

    mixture = Gate.mixture  # type: ignore[assignment]

    def __init__(self, config: Any, shape: Any) -> None:
        super().__init__(config, shape)
        self.linear = nn.Linear(shape.width, shape.choices)


@pytest.fixture(autouse=True)
def _own_gates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GATES._classes, "counting", Counting)
    monkeypatch.setitem(GATES._classes, "alone", Alone)


def make(schema: Schema = SCHEMA, *, gate: str = "counting", seed: int = 0, **options: Any) -> CTRModel:
    torch.manual_seed(seed)
    options = {"experts": 3, "expert": {"hidden": [6]}, "embedding_std": 0.5, **options}
    return create_model("aw_moe", schema, gates={"expert": gate}, **options)


def test_experts_score_and_the_history_weighs_them() -> None:
    model, batch = make().eval(), example_batch(SCHEMA, rows=7)
    embedded = model.inputs.embed(batch)
    history = embedded.sequences["clicks"]
    x = model.interest(embedded).flat
    weights = model.gate.mixture(x, history.values(), history.offsets(), embedded.field("item"))
    ones = torch.eye(3)
    scores = torch.stack([model.experts(x, ones[k].expand(7, 3)).squeeze(1) for k in range(3)], dim=1)
    torch.testing.assert_close(model(batch), (weights * scores).sum(1))
    told = model.telemetry(batch)["gate"]
    assert told["mean"] == pytest.approx(weights.mean().item(), rel=1e-4)


def test_training_adds_the_contrast_of_two_views_that_the_gate_alone_sees() -> None:
    plain, contrasted = (make(contrast={"weight": w, "mask": 0.5}).train() for w in (0.0, 0.5))
    batch = example_batch(SCHEMA, rows=64)
    torch.manual_seed(0)
    without, logits = plain.loss(batch)
    torch.manual_seed(0)
    with_, same = contrasted.loss(batch)
    torch.testing.assert_close(same, logits)
    torch.testing.assert_close(
        without, F.binary_cross_entropy_with_logits(logits, batch.label) + plain.gate.penalty()
    )
    assert with_ > without
    (whole, offsets), *views = contrasted.gate.seen
    assert len(plain.gate.seen) == 1
    assert len(views) == 2
    for thinned, kept in views:
        assert 0.3 < len(thinned) / len(whole) < 0.8
        assert torch.equal(kept.diff() > 0, offsets.diff() > 0)
    assert not torch.equal(views[0][1], views[1][1])


def test_evaluation_is_without_the_contrast_and_not_random() -> None:
    model, batch = make().eval(), example_batch(SCHEMA, rows=64)
    first, logits = model.loss(batch)
    assert torch.equal(first, model.loss(batch)[0])
    torch.testing.assert_close(first, F.binary_cross_entropy_with_logits(logits, batch.label))


def contrast_of(batch: Any, **contrast: Any) -> float:
    both = []
    for weight in (0.0, 1.0):
        model = make(contrast={"weight": weight, "mask": 0.0, **contrast}).train()
        both.append(model.loss(batch)[0].item())
    return both[1] - both[0]


def test_rows_of_one_user_are_not_told_apart() -> None:
    batch = example_batch(SCHEMA, rows=64)
    batch.group.fill_(7)
    assert contrast_of(batch) == pytest.approx(0, abs=1e-6)
    batch.group.copy_(torch.arange(1, 65))
    assert contrast_of(batch) > 1


def test_the_first_rows_are_told_apart() -> None:
    batch = example_batch(SCHEMA, rows=64)
    batch.group.copy_(torch.arange(1, 65))
    some = contrast_of(batch, rows=16)
    assert some < contrast_of(batch, rows=64)
    batch.group[16:] = 1
    assert contrast_of(batch, rows=16) == pytest.approx(some, rel=1e-6)
    assert contrast_of(batch, rows=1000) == pytest.approx(contrast_of(batch, rows=64), rel=1e-6)


def test_rows_without_behaviours_are_left_out() -> None:
    batch = example_batch(SCHEMA, rows=64)
    batch.group.copy_(torch.arange(1, 65))
    there = batch.sequences.lengths() > 0
    assert not there.all()
    some = contrast_of(batch)
    batch.group[~there] = 1  # whose rows they are makes no difference
    assert contrast_of(batch) == pytest.approx(some, rel=1e-6)


def test_a_gate_that_does_not_look_at_behaviours_has_no_contrast() -> None:
    model, batch = make(gate="alone", contrast={"weight": 10.0}).train(), example_batch(SCHEMA, rows=64)
    loss, logits = model.loss(batch)
    torch.testing.assert_close(loss, F.binary_cross_entropy_with_logits(logits, batch.label))


def test_the_gate_reads_the_history_that_is_named() -> None:
    batch = example_batch(TWO, rows=16)
    for name, key in (("clicks", 0), ("visits", 1)):
        model = make(TWO, history=name).eval()
        model(batch)
        assert len(model.gate.seen[0][0]) == batch.sequences.length_per_key()[key]
    assert make(TWO).history == "clicks"
    with pytest.raises(
        ConfigError, match=r"model.history: no history 'clikcs' with a target. did you mean 'clicks'"
    ):
        make(TWO, history="clikcs")


def test_without_histories_the_row_weighs() -> None:
    schema = Schema.of({"user": 5, "item": 9}, dim=4)
    model, batch = make(schema, gate="attention_weighted").train(), example_batch(schema, rows=16)
    loss, logits = model.loss(batch)
    torch.testing.assert_close(loss, F.binary_cross_entropy_with_logits(logits, batch.label))


def test_a_batch_without_any_behaviour() -> None:
    empty = Schema(sparse=(ITEM,), sequences=(CLICKS.model_copy(update={"max_length": 0}),))
    loss, _ = make(contrast={"weight": 1.0}).train().loss(example_batch(empty, rows=8))
    loss.backward()
    assert loss.isfinite()


def rows_of_users(count: int = 64) -> Any:
    batch = example_batch(SCHEMA, rows=count)
    batch.group.copy_(torch.arange(count) // 2 + 1)
    return batch


def test_masking_at_random_is_the_default_and_draws_as_it_always_did() -> None:
    model, batch = make(gate="attention_weighted", contrast={"weight": 0.5, "mask": 0.4}).train(), rows_of_users()
    assert model.teacher is None
    assert not [name for name in model.state_dict() if "teacher" in name]
    torch.manual_seed(3)
    found, logits = model.loss(batch)
    torch.manual_seed(3)
    x, (values, offsets, query) = model._inputs(batch)
    views = [model.gate.mixture(x, *masked_view(values, offsets, 0.4), query) for _ in range(2)]
    there = offsets.diff() > 0
    contrast = contrastive_loss(*(view[there] for view in views), batch.group[there], temperature=0.1)
    assert torch.equal(found, model.loss_of(logits, batch) + 0.5 * contrast)


def hard(**contrast: Any) -> CTRModel:
    return make(gate="attention_weighted", contrast={"masking": "hard", "weight": 0.5, **contrast})


def test_hard_views_lose_what_counts_most_for_the_averaged_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = hard(mask=0.25, teacher_decay=0.5).train(), rows_of_users()
    with torch.no_grad():
        for average in model.teacher.buffers():
            average.copy_(torch.randn_like(average))
    expected = [
        0.5 * a + 0.5 * w.detach() for a, w in zip(model.teacher.buffers(), model.gate.parameters(), strict=True)
    ]
    seen = []
    mixture = model.gate.mixture
    monkeypatch.setattr(model.gate, "mixture", lambda *given: seen.append(given[1:3]) or mixture(*given))
    model.loss(batch)
    torch.testing.assert_close(list(model.teacher.buffers()), expected)

    (values, offsets), *views = seen
    _, history = model._inputs(batch)
    attention = model.teacher(model.gate, *history)
    assert len(views) == 2
    for thinned, kept in views:
        assert len(thinned) < len(values)
        for row in range(len(batch)):
            whole = values[offsets[row] : offsets[row + 1]].tolist()
            rest = thinned[kept[row] : kept[row + 1]].tolist()
            order = attention[offsets[row] : offsets[row + 1]].argsort(descending=True)
            spared = [whole[i] for i in order[-(-len(whole) // 2) :]]  # the half that counts less stays
            assert all(behaviour in rest for behaviour in spared)


def test_the_teacher_follows_the_gate_in_training_alone() -> None:
    model, batch = hard().train(), rows_of_users()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    before = [average.clone() for average in model.teacher.buffers()]
    for _ in range(2):
        optimizer.zero_grad()
        model.loss(batch)[0].backward()
        optimizer.step()
    trained = [average.clone() for average in model.teacher.buffers()]
    assert any(not torch.equal(one, other) for one, other in zip(before, trained, strict=True))
    model.eval()
    model.loss(batch)
    model.telemetry(batch)
    assert all(torch.equal(a, b) for a, b in zip(trained, model.teacher.buffers(), strict=True))
    assert len(model.gates()) == len(make(gate="attention_weighted").gates())
    assert torch.equal(model(batch), make_like(model)(batch))


def make_like(model: CTRModel) -> CTRModel:
    """The same model, read back from its weights."""
    again = hard()
    again.load_state_dict(model.state_dict())
    return again.eval()


def test_hard_masking_needs_a_gate_that_says_what_counts() -> None:
    with pytest.raises(ConfigError, match=r"model\.contrast\.masking: gate 'counting' does not say.*random"):
        make(contrast={"masking": "hard"})
    assert make(gate="alone", contrast={"masking": "hard"}).teacher is None  # has no views at all
    assert make(contrast={"masking": "hard", "weight": 0.0}).teacher is None


def test_telemetry_tells_how_the_gate_s_outputs_are_spread() -> None:
    model, batch = make(gate="attention_weighted").train(), rows_of_users()
    state = torch.get_rng_state()
    told = model.telemetry(batch)["gate"]
    assert torch.equal(torch.get_rng_state(), state)  # or training would go another way
    assert model.training
    assert told == model.telemetry(batch)["gate"]
    x, history = model.eval()._inputs(batch)
    there = history.offsets.diff() > 0
    g = model.gate.mixture(x, *history)[there].detach()
    expected = spread(g, g, g, batch.group[there])
    assert told["uniformity"] == pytest.approx(expected["uniformity"], rel=1e-5)
    assert told["tolerance"] == pytest.approx(expected["tolerance"], rel=1e-5)
    assert -1 <= told["alignment"] <= 1
    assert "choice_2" in told
    assert "uniformity" not in make(gate="alone").telemetry(batch)["gate"]
    plain = Schema.of({"item": 9}, dim=4)
    assert (
        "uniformity" not in make(plain, gate="attention_weighted").telemetry(example_batch(plain, rows=4))["gate"]
    )


def test_a_lower_temperature_spreads_the_outputs_further() -> None:
    batch = rows_of_users()
    told = {}
    for temperature in (0.05, 5.0):
        model = make(gate="attention_weighted", contrast={"weight": 10.0, "temperature": temperature}).train()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        torch.manual_seed(1)
        for _ in range(40):
            optimizer.zero_grad()
            model.loss(batch)[0].backward()
            optimizer.step()
        told[temperature] = model.telemetry(batch)["gate"]
    assert told[0.05]["uniformity"] > told[5.0]["uniformity"] + 0.1
