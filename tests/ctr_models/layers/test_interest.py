from __future__ import annotations

import pytest
import torch

from ctr_models import FeatureEmbedding, GateSpec, IdField, Schema, example_batch
from ctr_models.errors import ConfigError
from ctr_models.layers.interest import Interest
from ctr_models.layers.target_attention import TargetAttentionConfig


def field(name: str, *, table: str = "", dim: int = 4, target: str | None = None) -> IdField:
    kind = "sequence" if table else "categorical"
    return IdField(name=name, rows=9, dim=dim, table=table, kind=kind, target=target, max_length=6)


SCHEMA = Schema(
    sparse=(field("user"), field("item"), field("shop", dim=3)),
    sequences=(
        field("clicks", table="item", target="item"),
        field("searches", table="user"),
        field("visits", table="shop", dim=3, target="shop"),
    ),
)


def make(schema: Schema) -> tuple[FeatureEmbedding, Interest]:
    torch.manual_seed(0)
    return (
        FeatureEmbedding(schema, std=0.5),
        Interest(schema, TargetAttentionConfig(hidden=(6,)), GateSpec(name="none")).eval(),
    )


def test_each_history_is_asked_by_its_own_target() -> None:
    embedding, interest = make(SCHEMA)
    embedded = embedding(example_batch(SCHEMA, rows=7))
    replaced = interest(embedded)
    assert replaced.names == embedded.names
    for name in ("user", "item", "shop", "searches"):
        assert torch.equal(replaced.field(name), embedded.field(name))
    for attention, (name, target) in zip(
        interest.attentions, {"clicks": "item", "visits": "shop"}.items(), strict=True
    ):
        history = embedded.sequences[name]
        expected = []
        for row, behaviours in enumerate(history.to_dense()):
            q = embedded.field(target)[row : row + 1]
            scores = attention(behaviours, torch.tensor([0, len(behaviours)]), q)
            expected.append((scores.unsqueeze(1) * behaviours).sum(0))
        torch.testing.assert_close(replaced.field(name), torch.stack(expected))


def test_without_histories_nothing_changes() -> None:
    schema = SCHEMA.only({"user", "item"})
    embedding, interest = make(schema)
    embedded = embedding(example_batch(schema, rows=7))
    assert interest(embedded) is embedded
    assert not list(interest.parameters())


def test_histories_without_any_target_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"no history \(clicks, searches\) says which .* target: item_id"):
        make(SCHEMA.only({"user", "clicks", "searches"}))


def test_a_target_of_another_dim_is_refused() -> None:
    schema = Schema(sparse=(field("item"),), sequences=(field("visits", table="shop", dim=3, target="item"),))
    with pytest.raises(ConfigError, match=r"'visits' has dim 3, its target 'item' has 4"):
        make(schema)
