from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from ctr_models import create_model
from pipelines.training.predict import predict


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
