"""Programs: which library multiplies, how many rows there are, and what is folded. That they score alike is in
tests/contract/test_programs.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ctr_models import DenseField, IdField, Schema, create_model
from ctr_models.example import example_batch, example_rows
from ctr_models.export import tensors
from ctr_models.program import RowScores, filled, folded, traced
from kernels.product import fast_products

SCHEMA = Schema(
    dense=(DenseField(name="price", dim=4),),
    sparse=(IdField(name="user", rows=50, dim=4), IdField(name="item", rows=90, dim=4)),
)
fast = pytest.mark.skipif(not fast_products(), reason="torch's two libraries are equally fast on this processor")


def test_batch_norms_are_folded_and_all_else_is_shared() -> None:
    model = create_model("dnn", SCHEMA, mlp={"hidden": [8, 8], "batch_norm": True, "dropout": 0.1})
    for seed in range(5):
        model(example_batch(SCHEMA, rows=64, seed=seed))  # training: the norms take what they see
    made, batch = folded(model.eval()), example_batch(SCHEMA, rows=9)
    with torch.no_grad():
        torch.testing.assert_close(made(batch), model(batch), rtol=1e-5, atol=1e-6)
    assert not any(isinstance(one, torch.nn.BatchNorm1d) for one in made.modules())
    assert sum(isinstance(one, torch.nn.BatchNorm1d) for one in model.modules()) == 2
    own = {one.data_ptr() for one in model.parameters()}
    shared = [name for name, one in made.named_parameters() if one.data_ptr() in own]
    assert any("embedding" in name for name in shared)
    assert {name for name, _ in made.named_parameters()} - set(shared) == {
        "mlp.0.weight", "mlp.0.bias", "mlp.3.weight", "mlp.3.bias"
    }  # fmt: skip


def test_without_batch_norms_nothing_is_copied() -> None:
    model = create_model("dnn", SCHEMA, mlp={"hidden": [8]}).eval()
    assert [one.data_ptr() for one in folded(model).parameters()] == [one.data_ptr() for one in model.parameters()]


@fast
def test_products_of_many_rows_go_to_the_faster_library() -> None:
    model = create_model("dnn", SCHEMA, mlp={"hidden": [64, 64]}).eval()
    program = traced(RowScores(model), tensors(example_batch(SCHEMA, rows=3)))

    def called(rows: int) -> set[str]:
        given = tensors(example_batch(SCHEMA, rows=rows))
        with torch.inference_mode():
            program(*given)
            with torch.profiler.profile() as seen:
                program(*given)
        return {event.key for event in seen.key_averages()} & {"aten::addmm", "mkldnn::_linear_pointwise"}

    assert called(100) == {"aten::addmm"}
    assert "mkldnn::_linear_pointwise" in called(300)


@pytest.mark.parametrize("rows", [1, 2, 15, 16, 17, 63, 100, 129, 500, 777, 2000])
def test_rows_are_filled_up_with_the_last(rows: int) -> None:
    given = example_rows(SCHEMA, rows=rows)
    more = filled(given)
    last = np.minimum(np.arange(len(more)), rows - 1)
    np.testing.assert_array_equal(more.single, given.single[:, last])
    np.testing.assert_array_equal(more.dense, given.dense[last])
    assert len(more) <= rows * 1.125 + 8


@fast
def test_there_are_few_numbers_of_rows() -> None:
    assert len({len(filled(example_rows(SCHEMA, rows=rows))) for rows in range(1, 2049)}) == 62
