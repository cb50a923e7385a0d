from __future__ import annotations

import numpy as np
import pytest
import torch

from ctr_models import Schema, create_model, example_rows
from ctr_models.errors import ConfigError
from pipelines.training.config import PlateauConfig, StoppingConfig, TrainConfig
from pipelines.training.distributed import Ranks
from pipelines.training.engine import Engine
from pipelines.training.optimizers import Progress, check_tables, judge

CPU = Ranks(0, 1, torch.device("cpu"))
SCHEMA = Schema.of({"user": 30, "item": 20}, dense=["price"], dim=8)


def batches(count=6, rows=40):
    rows = example_rows(SCHEMA, rows=count * rows)
    size = len(rows) // count
    return [rows.batch(slice(i * size, (i + 1) * size)) for i in range(count)]


def model():
    torch.manual_seed(5)
    return create_model("dnn", SCHEMA, embedding_std=0.1, mlp={"hidden": [16]})


def engine(counts=None, **train):
    made = Engine(model(), TrainConfig.model_validate(train), CPU, counts)
    made.train()
    return made


def tables(weights):
    return {name: tensor for name, tensor in weights.items() if "embedding_bags" in name}


def test_published_training_is_reproduced_step_by_step():
    """The regulariser joins the loss over whole tables; the norm is clipped after; then Adam."""
    l2, limit = 0.05, 0.02  # a limit so low that clipping matters
    ours = engine(embedding={"backend": "dense", "l2": l2}, clip_norm=limit, optimizer={"lr": 1e-2})
    theirs = model()
    embedded = [p for n, p in theirs.named_parameters() if "embedding_bags" in n or "dense_vectors" in n]
    adam = torch.optim.Adam(theirs.parameters(), lr=1e-2)
    for batch in batches():
        ours.step(batch)
        adam.zero_grad()
        loss, _ = theirs.loss(batch)
        (loss + sum(l2 / 2 * p.square().sum() for p in embedded)).backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), limit)
        adam.step()
    expected = theirs.state_dict()
    for name, tensor in ours.weights().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)


def test_weight_decay_of_the_layers_spares_biases():
    plain, decayed = (
        engine(optimizer={"name": "sgd", "lr": 0.1}),
        engine(optimizer={"name": "sgd", "lr": 0.1, "l2": 0.5}),
    )
    before = model().state_dict()
    (batch,) = batches(1)
    plain.step(batch)
    decayed.step(batch)
    a, b = plain.weights(), decayed.weights()
    torch.testing.assert_close(a["mlp.0.weight"] - b["mlp.0.weight"], 0.1 * 0.5 * before["mlp.0.weight"])
    assert torch.equal(a["mlp.0.bias"], b["mlp.0.bias"])


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad"])
def test_fused_tables_move_as_dense_ones_do(optimizer):
    settings = {"optimizer": optimizer, "lr": 0.1, "eps": 1e-6}
    fused, dense = (
        engine(embedding={"backend": backend, **settings}, clip_norm=None) for backend in ("fused", "dense")
    )
    for batch in batches():
        torch.testing.assert_close(fused.step(batch), dense.step(batch))
    found = tables(fused.weights())
    assert set(found) == set(tables(dense.weights()))
    for name, tensor in tables(dense.weights()).items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)
        assert not torch.equal(tensor, model().state_dict()[name])


def test_fused_tables_leave_rows_outside_the_batch_alone():
    fused = engine()
    (batch,) = batches(1, rows=5)
    fused.step(batch)
    seen = batch.sparse["user"].values().long()
    moved = (
        fused.weights()["inputs.embedding.bags.embedding_bags.user.weight"]
        != model().state_dict()["inputs.embedding.bags.embedding_bags.user.weight"]
    ).any(1)
    assert moved.nonzero().flatten().tolist() == seen.unique().tolist()


@pytest.mark.parametrize("backend", ["fused", "dense"])
def test_mini_batch_aware_l2_decays_each_row_of_the_batch_once_by_its_count(backend):
    counts = {"user": np.arange(30) + 1, "item": np.full(20, 4)}
    base = {"backend": backend, "optimizer": "sgd", "lr": 0.1}
    plain = engine(embedding=base, clip_norm=None)
    decayed = engine(counts, embedding={**base, "l2": 0.5, "l2_mode": "touched"}, clip_norm=None)
    before = model().state_dict()
    (batch,) = batches(1)
    plain.step(batch)
    decayed.step(batch)
    for field in ("user", "item"):
        name = f"inputs.embedding.bags.embedding_bags.{field}.weight"
        ids = batch.sparse[field].values().long().unique()
        expected = torch.zeros_like(before[name])
        per_row = torch.as_tensor(0.5 / counts[field][ids.numpy()], dtype=torch.float32)
        expected[ids] = 0.1 * per_row[:, None] * before[name][ids]
        torch.testing.assert_close(plain.weights()[name] - decayed.weights()[name], expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("embedding", [{"backend": "fused", "optimizer": "sgd"}, {"backend": "dense"}])
def test_the_learning_rate_scales_everywhere(embedding):
    still = engine(embedding=embedding, optimizer={"name": "sgd"})
    still.scale_lr(0.0)
    for batch in batches(3):
        still.step(batch)
    for name, tensor in model().state_dict().items():
        assert torch.equal(still.weights()[name], tensor), name


def test_bfloat16_trains_close_to_float32():
    exact, rough = engine(), engine(precision="bfloat16")
    for batch in batches(3):
        a, b = exact.step(batch), rough.step(batch)
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)
    assert all(t.dtype == torch.float32 for t in tables(rough.weights()).values())


@pytest.mark.parametrize(
    ("train", "dim", "says"),
    [
        ({"embedding": {"optimizer": "adam"}}, 8, "train.embedding.optimizer: fused Adam needs a CUDA device"),
        ({"embedding": {"l2": 0.1}}, 8, "train.embedding.l2_mode: .* use l2_mode=touched"),
        ({}, 10, "column 'user' has dimension 10; .* multiple of 4. use 12, or train.embedding.backend=dense"),
        ({"embedding": {"backend": "dense", "optimizer": "rowwise_adagrad"}}, 8, "row-wise Adagrad"),
    ],
)
def test_what_the_tables_cannot_do_is_refused(train, dim, says):
    made = create_model("dnn", SCHEMA.with_dim(dim))
    with pytest.raises(ConfigError, match=says):
        check_tables(TrainConfig.model_validate(train), made, torch.device("cpu"))


def test_dense_tables_take_any_dimension():
    check_tables(
        TrainConfig.model_validate({"embedding": {"backend": "dense"}}),
        create_model("dnn", SCHEMA.with_dim(10)),
        torch.device("cpu"),
    )


def judged(values, stopping=None, plateau=None, lr=1e-3):
    progress, best, scales = Progress(), [], []
    for value in values:
        if progress.done:
            break
        best.append(judge(progress, value, stopping, plateau, lr))
        scales.append(progress.lr_scale)
        progress.epoch += 1
    return progress, best, scales


def test_plateau_and_stopping_follow_the_published_schedule():
    progress, best, scales = judged([0.7, 0.8, 0.79, 0.81, 0.80, 0.805, 0.9], StoppingConfig(), PlateauConfig())
    assert best == [True, True, False, True, False, False]
    assert scales == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.001])
    assert progress.done
    assert (progress.best, progress.best_epoch) == (0.81, 3)


def test_the_rate_has_a_floor():
    _, _, scales = judged([0.9] + [0.1] * 6, None, PlateauConfig(min_lr=1e-5))
    assert scales[-1] == pytest.approx(0.01)


def test_a_gain_below_min_delta_is_no_gain():
    _, best, _ = judged([0.5, 0.5001, 0.52], StoppingConfig(min_delta=0.01), None)
    assert best == [True, False, True]


def test_without_stopping_every_epoch_is_trained():
    progress, best, scales = judged([0.5, 0.4, 0.3, 0.2])
    assert not progress.done
    assert len(best) == 4
    assert scales == [1, 1, 1, 1]
