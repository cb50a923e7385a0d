"""The int8 card of a bundle: it names what bears eight bits, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ctr_models import Schema, create_model, example_rows
from ctr_models.batch import EncodedRows
from ctr_models.errors import ArtifactError
from ctr_models.int8 import definitions, supported
from ctr_models.model import CTRModel
from ctr_models.schema import IdField
from pipelines.release.bundle import INT8, Bundle
from pipelines.release.example import example_bundle
from pipelines.release.int8 import AUC_CHANGE, LARGEST, Int8Card, _in_int8, scores

pytestmark = pytest.mark.skipif(not supported(), reason="torch has no int8 products on this machine")
SCHEMA = Schema.of({"user": 50, "item": 60, "hour": 24}, dense=["price"])


def model_of(name: str, std: float) -> CTRModel:
    torch.manual_seed(0)
    model = create_model(name, SCHEMA).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=std)
    return model


def rows_of(count: int, seed: int, schema: Schema = SCHEMA) -> EncodedRows:
    rows = example_rows(schema, rows=count, seed=seed)
    rows.label[:] = np.random.default_rng(seed).integers(0, 2, count)
    return rows


def test_the_layers_that_are_named_leave_scores_and_auc_as_they_are() -> None:
    model, seen, unseen = model_of("gdcn", 0.05), rows_of(3000, 1), rows_of(5000, 2)
    card = Int8Card.of(model, seen, unseen)
    assert card is not None
    with definitions(model):
        apart = np.abs(_in_int8(model, card.ranges, unseen) - scores(model, unseen))
    assert apart.max() == pytest.approx(card.largest)
    assert 0 < card.largest <= LARGEST
    assert abs(card.auc_change) <= AUC_CHANGE
    assert card.rows == 5000


def test_layers_that_change_scores_are_not_named() -> None:
    model = model_of("gdcn", 0.05)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("mlp.0"):
                parameter.mul_(20)
    card = Int8Card.of(model, rows_of(3000, 1), rows_of(5000, 2))
    assert card is not None
    assert "mlp.0.weight" not in card.ranges
    assert any(name.startswith("cross.") for name in card.ranges)


def test_no_card_where_no_layer_bears_it() -> None:
    assert Int8Card.of(model_of("dnn", 1.0), rows_of(500, 1), rows_of(500, 2)) is None


def test_no_card_without_both_labels_of_lists_or_of_a_model_without_products() -> None:
    model, rows, one_kind = model_of("gdcn", 0.05), rows_of(1000, 1), rows_of(1000, 2)
    told = scores(model, rows)
    rows.label[:] = told > np.median(told)
    one_kind.label[:] = 0
    assert Int8Card.of(model, rows, rows) is not None
    assert Int8Card.of(model, rows, one_kind) is None
    lists = Schema(dense=(), sparse=(IdField(name="tags", rows=9, dim=4, kind="multi"),))
    assert Int8Card.of(create_model("dnn", lists).eval(), rows_of(50, 1, lists), rows_of(50, 2, lists)) is None
    assert Int8Card.of(create_model("fm", SCHEMA).eval(), rows, rows) is None


def test_a_model_that_gives_no_numbers_has_no_card() -> None:
    model, rows = model_of("dnn", 0.05), rows_of(500, 1)
    with torch.no_grad():
        next(iter(model.mlp.parameters())).fill_(float("nan"))  # type: ignore[operator, union-attr]
    assert Int8Card.of(model, rows, rows) is None


def test_a_bundle_without_a_card_loads_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    bundle = example_bundle(tmp_path / "bundle")  # of a schema with lists
    assert bundle.int8 is None
    assert not (bundle.directory / INT8).exists()
    (tmp_path / INT8).write_text(json.dumps({"ranges": {"w": [0, 1]}, "rows": 9, "auc": 0.7, "auc_change": 0.1}))
    with pytest.raises(ArtifactError, match=f"{INT8}: not the int8 card of a bundle .auc_change"):
        Int8Card.read(tmp_path / INT8)
    assert Bundle.load(bundle.directory).int8 is None
