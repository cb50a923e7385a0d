from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ctr_models import Schema, create_model
from ctr_models.errors import ConfigError
from ctr_models.schema import IdField
from pipelines.training.checkpoint import read_tensors, verify
from pipelines.training.config import TrainConfig
from pipelines.training.distributed import Ranks, check_sharding, ranks
from pipelines.training.predict import predict
from pipelines.training.trainer import read_result

HERE = Path(__file__).parent
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def steps():
    """The script that torchrun runs, as a module."""
    sys.path.insert(0, str(HERE))
    try:
        import sharded_steps

        yield sharded_steps
    finally:
        sys.path.remove(str(HERE))


@pytest.fixture(scope="module")
def job(tmp_path_factory, steps):
    """What two gloo ranks left behind."""
    folder = tmp_path_factory.mktemp("job")
    steps.lay(folder)
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    done = subprocess.run(
        [*command, str(HERE / "sharded_steps.py"), str(folder)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return folder


CASES = ["row_wise", "table_wise", "column_wise", "data_parallel", "row_wise-norm", "data_parallel-dense"]
CASES += ["row_wise-tasks"]  # ranks know of unequally many labels


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_move_as_one_process(job, steps, case):
    world = steps.world_of(job, case)
    expected = steps.steps(world, case, Ranks(0, 1, CPU)).weights()
    untrained = steps.model(world, case).state_dict()
    plain = steps.model(world, case)
    verify(job / "found" / case)
    read_tensors(job / "found" / case, {f"model/{n}": t for n, t in plain.state_dict().items()})
    for name, tensor in plain.state_dict().items():
        assert (tensor - expected[name]).abs().max() <= 1e-5, name
        if name.endswith("weight") and "embedd" in name:
            assert (tensor != untrained[name]).any(), f"{name} never moved"


def test_two_ranks_score_further_tasks_as_one_process(job, steps):
    case = "row_wise-tasks"
    world = steps.world_of(job, case)
    model = steps.model(world, case)
    read_tensors(job / "found" / case, {f"model/{n}": t for n, t in model.state_dict().items()})
    found = json.loads((job / "tasks.json").read_text())
    assert found == pytest.approx(predict(model, world, "valid").metrics(), abs=1e-5)
    assert found["auc_conversion"] > 0.5


def test_the_script_covers_every_kind(steps):
    assert list(steps.CASES) == CASES


def test_a_run_of_two_ranks_becomes_an_ordinary_model(job, steps):
    from ctr_models.model import ModelSpec

    world = steps.world_of(job, "row_wise")
    result = read_result(job / "run")
    config = steps.make_config(job)
    model = ModelSpec.parse(config.model).build(world.schema)
    weights = job / "run" / "fit" / f"best-{result['best_epoch'] - 1:04d}"
    verify(weights)
    read_tensors(weights, {f"model/{n}": t for n, t in model.state_dict().items()})
    from pipelines.evaluation.metrics import evaluate

    for split in ("valid", "test"):  # valid was evaluated sharded over both ranks, test by the plain model
        rows = predict(model, world, split)
        found = evaluate(rows.label, rows.probability, rows.user)
        for name, value in found.items():
            assert result["metrics"][f"{split}_{name}"] == pytest.approx(value, abs=1e-5)


def test_one_process_goes_on_where_two_ranks_stopped(job, steps):
    """Weights, fused state and data position of the sharded checkpoint; dropout alone draws other numbers."""
    from pipelines.training.trainer import train

    world = steps.world_of(job, "row_wise")
    config = steps.make_config(job, epochs=2, parts=2, batch_size=48)
    result = train(config, world, run_dir=job / "half", resume=True, progress=False)
    expected = read_result(job / "run")
    assert result.history[0]["valid_auc"] == expected["history"][0]["valid_auc"]
    assert result.history[1]["valid_auc"] == pytest.approx(expected["history"][1]["valid_auc"], abs=0.03)


def engine_schema(dim=8, history=False):
    schema = Schema.of({"user": 30, "item": 20}, dim=dim)
    if history:
        past = IdField(name="past", rows=20, dim=dim, kind="sequence", table="item", target="item", max_length=4)
        schema = Schema(sparse=schema.sparse, sequences=(past,))
    return schema


@pytest.mark.parametrize(
    ("train", "schema", "says"),
    [
        (
            {"sharding": {"kind": "data_parallel"}},
            engine_schema(history=True),
            r"train.sharding.kind: table 'item' belongs to a sequence .* set train.sharding.tables.item=row_wise",
        ),
        (
            {"sharding": {"tables": {"usr": "row_wise"}}},
            engine_schema(),
            "train.sharding.tables: no table 'usr'. did you mean 'user'",
        ),
        (
            {"averaging": {}},
            engine_schema(),
            "train.averaging: weights are averaged in one process only. set it to null",
        ),
        (
            {"embedding": {"backend": "dense"}, "sharding": {"kind": "row_wise"}},
            engine_schema(),
            "keeps table 'user' whole on every rank. use train.sharding.kind=data_parallel",
        ),
        (
            {"embedding": {"optimizer": "adagrad"}, "sharding": {"kind": "column_wise"}},
            engine_schema(dim=12),
            "table 'user' of dimension 12 can't be cut into 2 shards .* use a dimension that 8 divides",
        ),
        (
            {"sharding": {"tables": {"item": "column_wise"}}},
            engine_schema(),
            r"train.sharding.tables.item: row-wise Adagrad needs whole rows.*optimizer=adagrad",
        ),
    ],
)
def test_what_cannot_be_sharded_is_refused(train, schema, says):
    with pytest.raises(ConfigError, match=says):
        check_sharding(create_model("dnn", schema), TrainConfig.model_validate(train), Ranks(0, 2, CPU))


def test_alone_there_is_nothing_to_join():
    with ranks() as me:
        assert (me.rank, me.world, me.first) == (0, 1, True)
        assert me.share("a") == "a"
        assert np.array_equal(me.concatenate(np.arange(3)), np.arange(3))
        me.wait()
    assert not torch.distributed.is_initialized()


def test_rank_batch_norm_alone_is_batch_norm(tmp_path):
    """One rank of a gloo job of one: the arithmetic itself, gradients and running statistics included."""
    from pipelines.training.distributed import RankBatchNorm

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        theirs, ours = nn.BatchNorm1d(5), RankBatchNorm(5)
        for _ in range(3):
            x = torch.randn(16, 5) * 3 + 1
            a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
            weights = torch.randn(16, 5)
            (theirs(a) * weights).sum().backward()
            (ours(b) * weights).sum().backward()
            torch.testing.assert_close(a.grad, b.grad)
        for name, tensor in theirs.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[name], tensor)
        torch.testing.assert_close(theirs.eval()(x), ours.eval()(x))
    finally:
        torch.distributed.destroy_process_group()
