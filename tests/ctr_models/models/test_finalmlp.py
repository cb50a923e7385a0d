from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ctr_models import CTRModel, Schema, create_model, example_batch
from ctr_models.errors import ConfigError

SCHEMA = Schema.of({"user": 12, "item": 9, "hour": 5}, dim=4, roles={"user": "user", "item": "item"})
MLP = {"hidden": [8, 6], "batch_norm": True}


def make(name: str, **options: Any) -> CTRModel:
    torch.manual_seed(0)
    return create_model(name, SCHEMA, embedding_std=0.5, **options).eval()


def test_without_gates_it_is_dualmlp_with_bilinear_fusion() -> None:
    dual = make("dualmlp", mlp1=MLP, mlp2=MLP)
    final = make("finalmlp", mlp1=MLP, mlp2=MLP, heads=2, gates={"feature": "none"})
    state = dual.state_dict()
    for s in (1, 2):
        state[f"fusion.w{s}"] = state.pop(f"mlp{s}.6.weight")[0]
    state["fusion.bias"] = (state.pop("mlp1.6.bias") + state.pop("mlp2.6.bias"))[0]
    batch = example_batch(SCHEMA, rows=7)

    # Same streams, no products: DualMLP.
    final.load_state_dict({**state, "fusion.weight": torch.zeros(2, 3, 3)})
    torch.testing.assert_close(final(batch), dual(batch), rtol=1e-6, atol=1e-6)

    # Same streams bit for bit, and the products on top.
    products = torch.randn(2, 3, 3)
    final.load_state_dict({**state, "fusion.weight": products})
    (x1, x2) = dual.inputs(batch)
    o1, o2 = nn.Sequential(*list(dual.mlp1)[:-1])(x1), nn.Sequential(*list(dual.mlp2)[:-1])(x2)
    assert torch.equal(final(batch), final.fusion(o1, o2))
    bilinear = sum(((a @ w) * b).sum(1) for a, w, b in zip(o1.chunk(2, 1), products, o2.chunk(2, 1), strict=True))
    torch.testing.assert_close(final(batch), dual(batch) + bilinear, rtol=1e-5, atol=1e-6)


def test_published_parameter_count_on_frappe() -> None:
    """253,392 in the published log: with tables of these rows, separate context tables, and a second bias."""
    rows = {"user": 956, "item": 4084, "daytime": 9, "weekday": 9, "isweekend": 4, "homework": 5, "cost": 4}
    rows |= {"weather": 11, "country": 82, "city": 235}
    assert sum(rows.values()) == 5399
    frappe = Schema.of(rows, dim=10, roles={"user": "user", "item": "item"})
    model = create_model(
        "finalmlp",
        frappe,
        mlp1={"hidden": [400], "dropout": 0.4, "batch_norm": True},
        mlp2={"hidden": [100], "dropout": 0.4, "batch_norm": True},
        heads=5,
        gates={"feature": {"name": "sigmoid2", "context": ["user", "item"], "hidden": [400]}},
    )
    d = 10 * len(rows)
    expected = (
        10 * (5399 + 956 + 4084)
        + 2 * ((10 * 400 + 400) + (400 * d + d))
        + (d * 400 + 400 + 2 * 400)
        + (d * 100 + 100 + 2 * 100)
        + (400 * 100 // 5 + 400 + 100 + 1)
    )
    assert sum(p.numel() for p in model.parameters()) == expected == 253_392 - 1


def test_heads_must_divide_both_streams() -> None:
    with pytest.raises(ConfigError, match=r"heads: 4 heads don't divide streams of 6 and 6. one of \[1, 2, 3, 6\]"):
        make("finalmlp", mlp1=MLP, mlp2=MLP, heads=4)


def test_the_fusion_gate_sees_the_other_stream() -> None:
    model, batch = make("finalmlp", mlp1=MLP, mlp2=MLP, heads=2, gates={"fusion": "sigmoid"}), example_batch(SCHEMA)
    seen = []
    model.fusion_gate1.register_forward_hook(lambda m, inputs, out: seen.append(inputs))
    model(batch)
    x1, x2 = model.inputs(batch)
    torch.testing.assert_close(seen[0][0], model.mlp1(x1))
    torch.testing.assert_close(seen[0][1], model.mlp2(x2))


def test_learned_context_has_a_live_gate() -> None:
    model = make("finalmlp").train()
    model.loss(example_batch(SCHEMA, rows=64))[0].backward()
    for gate in model.inputs.feature_gates:
        assert gate.learned.grad.abs().max() > 0
