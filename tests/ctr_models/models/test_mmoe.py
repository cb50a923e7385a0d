from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from ctr_models import GATES, Batch, CTRModel, Schema, create_model, example_batch
from ctr_models.errors import ConfigError
from ctr_models.models.mmoe import MMoE

TASKS = ("conversion", "return")
SCHEMA = Schema.of({"user": 12, "item": 9}, dense=["price"], dim=4, tasks=TASKS)
EXPERT_GATES = [name for name in GATES if "expert" in GATES[name].slots]


def make(schema: Schema = SCHEMA, **options: Any) -> MMoE:
    torch.manual_seed(0)
    small: dict[str, Any] = {"expert": {"hidden": [8]}, "tower": {"hidden": [6]}, "embedding_std": 0.3}
    model = create_model("mmoe", schema, **{**small, **options})
    assert isinstance(model, MMoE)
    return model


def gradients(model: CTRModel, batch: Batch) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model.loss(batch)[0].backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_it_is_the_equation() -> None:
    model, batch = make(), example_batch(SCHEMA, rows=5)
    (x,) = model.inputs(batch)
    weight, bias = model.experts.layers[0].weight, model.experts.layers[0].bias
    said = torch.stack([F.relu(x @ weight[k] + bias[k]) for k in range(4)], dim=1)  # (B, K, H)
    for t, (gate, tower) in enumerate(zip(model.task_gates, model.towers, strict=True)):
        shares = (x @ gate.linear.weight.T + gate.linear.bias).softmax(1)
        mixed = sum(shares[:, k : k + 1] * said[:, k] for k in range(4))
        torch.testing.assert_close(model.task_logits(batch)[:, t], tower(mixed).squeeze(1))


def test_the_click_comes_first_and_is_what_is_served() -> None:
    model, batch = make().eval(), example_batch(SCHEMA, rows=5)
    assert model.tasks == TASKS
    assert model.task_logits(batch).shape == (5, 3)
    torch.testing.assert_close(model(batch), model.task_logits(batch)[:, 0])


def test_the_loss_is_the_weighed_sum_over_known_labels() -> None:
    model, batch = make(task_weights={"return": 0.25}), example_batch(SCHEMA, rows=20)
    logits = model.task_logits(batch)
    expected = F.binary_cross_entropy_with_logits(logits[:, 0], batch.label)
    assert batch.targets is not None
    for t, weight in enumerate((1.0, 0.25)):
        known = ~batch.targets[:, t].isnan()
        assert 0 < known.sum() < 20
        expected = expected + weight * F.binary_cross_entropy_with_logits(
            logits[known, 1 + t], batch.targets[known, t]
        )
    loss, click = model.loss(batch)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(click, logits[:, 0])


def test_unknown_labels_move_no_weight() -> None:
    """Rows of which only the click is known leave the other towers alone, and move the rest as by the click."""
    model, batch = make(), example_batch(SCHEMA, rows=20)
    batch.targets = torch.full((20, 2), float("nan"))
    found = gradients(model, batch)
    plain = gradients(model, Batch(batch.dense, batch.sparse, batch.sequences, batch.label, batch.group))
    for name, gradient in found.items():
        assert gradient.isfinite().all(), name
        if name.startswith(("task_gates.", "towers.")) and name.split(".")[1] != "0":
            assert not gradient.any(), name
        else:
            torch.testing.assert_close(gradient, plain[name])


@pytest.mark.parametrize("gate", EXPERT_GATES)
def test_every_gate_of_the_slot_mixes_for_each_task(gate: str) -> None:
    model, batch = make(gates={"expert": gate}), example_batch(SCHEMA, rows=64)
    assert model.loss(batch)[0].isfinite()
    for name, gradient in gradients(model, batch).items():
        assert gradient.isfinite().all(), name
        assert gradient.any(), name
    assert {f"task_gates.{t}" for t in range(3)} <= set(model.telemetry(batch))


def test_data_with_one_label_make_a_plain_mixture_of_experts() -> None:
    schema = SCHEMA.model_copy(update={"tasks": ()})
    model, batch = make(schema), example_batch(schema, rows=6)
    assert batch.targets is None
    assert len(model.task_gates) == len(model.towers) == 1
    loss, logits = model.loss(batch)
    torch.testing.assert_close(loss, F.binary_cross_entropy_with_logits(logits, batch.label))


def test_a_weight_of_no_task_is_refused() -> None:
    with pytest.raises(ConfigError, match="no task 'conversoin'.*did you mean 'conversion'"):
        make(task_weights={"conversoin": 2})
    with pytest.raises(ConfigError, match=r"model.task_weights.buy: .* name its column in features.tasks"):
        make(Schema.of({"user": 3}), task_weights={"buy": 2})
    with pytest.raises(ConfigError, match="model.task_weights.return: must be at least 0"):
        make(task_weights={"return": -1})
