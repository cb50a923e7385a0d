from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from ctr_models import create_model
from ctr_models.errors import DataError
from pipelines.evaluation.metrics import auc
from pipelines.training.loader import Loader
from pipelines.training.predict import Predictions, predict


@pytest.fixture(scope="module")
def model(history_world):
    torch.manual_seed(0)
    return create_model("dnn", history_world.schema, embedding_std=0.5, mlp={"hidden": [8], "dropout": 0.5})


@pytest.mark.parametrize("batch_size", [1, 33, 200, 4096])
def test_every_row_once_in_order_for_any_batch_size(model, history_world, batch_size):
    found = predict(model, history_world, "valid", batch_size=batch_size)
    table = pq.read_table(history_world.files("valid"))
    assert len(found) == history_world.rows("valid") == 200
    assert np.array_equal(found.label, table["__label__"].to_numpy())
    assert np.array_equal(found.user, table["__user__"].to_numpy())
    assert np.array_equal(found.row, table["__row__"].to_numpy())
    whole = predict(model, history_world, "valid", batch_size=200)
    np.testing.assert_allclose(found.probability, whole.probability, atol=1e-6)
    assert ((found.probability > 0) & (found.probability < 1)).all()
    assert np.unique(found.probability).size > 100


def test_dropout_is_off(model, history_world):
    model.train()
    one, two = (predict(model, history_world, "test").probability for _ in range(2))
    assert np.array_equal(one, two)


def test_a_further_task_is_judged_by_the_rows_whose_label_is_known(task_world):
    torch.manual_seed(0)
    model = create_model("mmoe", task_world.schema, embedding_std=0.5, expert={"hidden": [8]})
    found = predict(model, task_world, "valid", batch_size=64)
    table = pq.read_table(task_world.files("valid"))
    label = table["__label_conversion__"].to_numpy()
    own, known = found.tasks["conversion"], ~np.isnan(label)
    assert 0 < len(own) == known.sum() < len(found)
    assert np.array_equal(own.label, label[known])
    assert np.array_equal(own.row, table["__row__"].to_numpy()[known])
    loader = Loader(task_world.files("valid"), task_world.schema, batch_size=4096)
    (batch,) = list(loader)
    logits = model.task_logits(batch).detach().double()
    np.testing.assert_allclose(found.probability, torch.sigmoid(logits[:, 0]), atol=1e-6)
    np.testing.assert_allclose(own.probability, torch.sigmoid(logits[known, 1]), atol=1e-6)
    metrics = found.metrics()
    assert metrics["auc"] == auc(found.label, found.probability)
    assert metrics["auc_conversion"] == auc(own.label, own.probability)


def test_what_is_not_defined_is_no_metric():
    none, half, rows = np.empty(0), np.full(4, 0.5), np.arange(4)
    never, unknown = Predictions(np.zeros(4), half, rows, rows), Predictions(none, none, none, none)
    tasks = {"never": never, "unknown": unknown}
    found = Predictions(np.array([0.0, 1, 0, 1]), half, rows, rows, tasks).metrics()
    assert set(found) == {"auc", "logloss", "ne", "ece"}  # GAUC: every user has one row
    with pytest.raises(DataError, match="all 4 labels are 0"):
        never.metrics()
