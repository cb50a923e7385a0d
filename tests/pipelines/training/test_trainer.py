from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from ctr_models.errors import ArtifactError, ConfigError
from ctr_models.model import ModelSpec
from pipelines.evaluation.metrics import auc
from pipelines.training.predict import predict
from pipelines.training.trainer import read_result, train
from tests.pipelines.training.breaking import Broken, break_at

HERE = Path(__file__).parent


def run(config, world, folder, **more):
    return train(config, world, run_dir=folder, progress=False, **more)


def weights(result):
    return result.model.state_dict()


def equal(a, b):
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


def timeless(history):
    return [{k: v for k, v in r.items() if k not in ("rows_per_second", "evaluation_seconds")} for r in history]


def test_a_run_learns_and_reports(config, world, tmp_path):
    result = run(config(epochs=5, optimizer={"lr": 0.01}), world, tmp_path / "run")
    assert result.metrics["test_auc"] > 0.6
    assert {"valid_auc", "valid_logloss", "valid_gauc", "valid_ne", "valid_ece", "test_gauc"} <= set(result.metrics)
    assert [r["epoch"] for r in result.history] == list(range(1, len(result.history) + 1))
    assert "gate/inputs.feature_gates.0/mean" in result.history[0]
    assert result.rows_per_second > 0
    assert result.mlflow_run_id is None
    assert not result.model.training
    assert read_result(tmp_path / "run")["metrics"] == result.metrics
    assert (tmp_path / "run" / "config.yaml").is_file()


def test_the_model_is_that_of_the_best_epoch(config, world, tmp_path):
    result = run(config(epochs=6, optimizer={"lr": 0.05}, stopping=None), world, tmp_path / "run")
    found = predict(result.model, world, "valid")
    best = max(result.history, key=lambda r: r["valid_auc"])
    assert auc(found.label, found.probability) == pytest.approx(best["valid_auc"], abs=1e-12)
    assert result.metrics["valid_auc"] == best["valid_auc"]
    assert best is not result.history[-1]  # or the test would show nothing


def test_the_model_is_the_average_of_its_steps(config, world, tmp_path, monkeypatch):
    from pipelines.training.engine import Engine

    settings = config(epochs=1, averaging={"decay": 0.9})
    step, seen = Engine.step, []

    def watched(self, batch):
        loss = step(self, batch)
        seen.append({name: tensor.clone() for name, tensor in self.model.state_dict().items()})
        return loss

    monkeypatch.setattr(Engine, "step", watched)
    result = run(settings, world, tmp_path / "run")
    torch.manual_seed(settings.seed)
    expected = settings.model.build(world.schema).state_dict()
    for n, weights_then in enumerate(seen, start=1):
        decay = min(0.9, (1 + n) / (10 + n))
        for name, tensor in weights_then.items():
            expected[name] = decay * expected[name] + (1 - decay) * tensor if tensor.is_floating_point() else tensor
    for name, tensor in weights(result).items():
        torch.testing.assert_close(tensor, expected[name], msg=name)
    found = predict(result.model, world, "valid")
    assert auc(found.label, found.probability) == pytest.approx(result.metrics["valid_auc"], abs=1e-12)


@pytest.mark.parametrize(
    "train_settings",
    [
        {},
        {"averaging": {"decay": 0.9}},
        {"embedding": {"backend": "dense", "l2": 1e-4}},
        {"embedding": {"optimizer": "sgd", "lr": 0.1, "l2": 0.01, "l2_mode": "touched"}, "parts": 2},
    ],
)
def test_one_seed_gives_one_result(config, history_world, tmp_path, train_settings):
    one, two = (run(config(**train_settings), history_world, tmp_path / name) for name in ("one", "two"))
    assert one.metrics == two.metrics
    assert timeless(one.history) == timeless(two.history)
    assert equal(weights(one), weights(two))
    assert any(not torch.equal(t, torch.zeros_like(t)) for t in weights(one).values())


def test_another_seed_gives_another(config, world, tmp_path):
    first = config()
    one = run(first, world, tmp_path / "one")
    two = run(first.model_copy(update={"seed": 7}), world, tmp_path / "two")
    assert not equal(weights(one), weights(two))


HARD = {"name": "aw_moe", "experts": 2, "expert": {"hidden": [4]}, "contrast": {"masking": "hard", "weight": 1.0}}
"""Averages weights in its buffers and draws random numbers in its loss."""


SETTINGS = {"fused": {}, "dense": {"embedding": {"backend": "dense"}}, "averaged": {"averaging": {"decay": 0.9}}}


@pytest.mark.parametrize(
    ("at_step", "more", "model"),
    [
        *(pytest.param(n, s, None, id=f"{name}-{n}") for name, s in SETTINGS.items() for n in (3, 12, 17, 24)),
        pytest.param(17, {}, HARD, id="hard-17"),
    ],
)
def test_a_broken_run_ends_as_the_unbroken(config, history_world, tmp_path, monkeypatch, at_step, more, model):
    """Broken off at any step: in the first epoch, at its end, in the second."""
    settings = config(epochs=3, checkpoint_every=5, **more)
    settings = settings.model_copy(update={"model": ModelSpec.parse(model)} if model else {})
    whole = run(settings, history_world, tmp_path / "whole")
    break_at(at_step, monkeypatch)
    with pytest.raises(Broken):
        run(settings, history_world, tmp_path / "broken")
    monkeypatch.undo()
    resumed = run(settings, history_world, tmp_path / "broken", resume=True)
    assert equal(weights(whole), weights(resumed))
    assert whole.metrics == resumed.metrics
    assert timeless(whole.history) == timeless(resumed.history)


SCRIPT = """
import sys
sys.path.insert(0, {here!r})
import torch
from conftest import World, make_config, make_schema
from pathlib import Path
from pipelines.training.trainer import train
torch.set_num_threads(1)
folder = Path({folder!r})
world = World(folder / "encoded", make_schema())
config = make_config(folder, epochs=200, checkpoint_every=2, stopping=None, plateau=None, batch_size=20)
train(config, world, run_dir=folder / "run", progress=False)
"""


def test_a_killed_run_goes_on_to_the_same_weights(tmp_path):
    """SIGKILL strikes wherever the process happens to be, again and again."""
    sys.path.insert(0, str(HERE))
    try:
        from conftest import make_config, make_world
    finally:
        sys.path.remove(str(HERE))
    world = make_world(tmp_path / "encoded", rows=200)
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT.format(here=str(HERE), folder=str(tmp_path))))
    child = subprocess.Popen([sys.executable, "-W", "ignore", str(script)], env={**os.environ})
    steps = tmp_path / "run" / "fit"
    deadline = time.monotonic() + 120
    while len(list(steps.glob("step-*"))) < 2 or max(int(p.name[5:]) for p in steps.glob("step-*")) < 14:
        assert child.poll() is None, "ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    reached = max(int(p.name[5:]) for p in steps.glob("step-*"))
    epochs = reached // 10 + 3
    settings = make_config(tmp_path, epochs=epochs, checkpoint_every=2, stopping=None, plateau=None, batch_size=20)
    resumed = run(settings, world, tmp_path / "run", resume=True)
    whole = run(settings, world, tmp_path / "whole")
    assert len(resumed.history) == epochs
    assert equal(weights(whole), weights(resumed))
    assert whole.metrics == resumed.metrics


def test_resuming_a_finished_run_changes_nothing(config, world, tmp_path):
    settings = config()
    one = run(settings, world, tmp_path / "run")
    two = run(settings, world, tmp_path / "run", resume=True)
    assert equal(weights(one), weights(two))
    assert one.metrics == two.metrics


def test_resuming_with_other_settings_is_refused(config, world, tmp_path):
    run(config(), world, tmp_path / "run")
    (tmp_path / "run" / "phases" / "0-fit.json").unlink()
    own = (tmp_path / "run" / "config.yaml").read_text()
    with pytest.raises(ConfigError, match="are not those that began this run"):
        run(config(optimizer={"lr": 0.5}), world, tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "config.yaml").read_text() == own  # the remedy that the message gives
    assert len(run(config(epochs=3), world, tmp_path / "run", resume=True).history) == 3
    assert "epochs: 3" in (tmp_path / "run" / "config.yaml").read_text()


def test_a_loss_that_explodes_is_said_so(config, world, tmp_path):
    settings = config(optimizer={"name": "sgd", "lr": 1e30}, clip_norm=None, embedding={"backend": "dense"})
    with pytest.raises(ConfigError, match=r"train: the loss is (nan|inf) in epoch 1.*lower train.optimizer.lr"):
        run(settings, world, tmp_path / "run")


def test_a_loss_that_exploded_is_not_kept_in_a_checkpoint(config, world, tmp_path):
    settings = config(
        optimizer={"name": "sgd", "lr": 1e30}, clip_norm=None, embedding={"backend": "dense"}, checkpoint_every=4
    )
    with pytest.raises(ConfigError, match="train: the loss is (nan|inf)"):
        run(settings, world, tmp_path / "run")
    assert list((tmp_path / "run" / "fit").glob("step-*")) == []


def test_a_run_that_is_not_finished_has_no_result(tmp_path):
    with pytest.raises(ArtifactError, match="no finished run stands here"):
        read_result(tmp_path)


def test_history_is_plain_json(config, world, tmp_path):
    result = run(config(epochs=1), world, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "result.json").read_text())["history"] == result.history


def test_threads_are_given_back(config, world, tmp_path):
    torch.set_num_threads(2)
    try:
        run(config(epochs=1, threads=1), world, tmp_path / "run")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
