from __future__ import annotations

from dataclasses import replace

import pytest

from ctr_models.errors import ArtifactError
from pipelines.experiments.trial import identity, run_trial


def test_a_finished_trial_is_read_back_and_not_trained_again(config, rows, trained, tmp_path):
    first = run_trial(config, rows, tmp_path / "arm")
    again = run_trial(config, rows, tmp_path / "arm")
    assert (first.fresh, again.fresh, len(trained)) == (True, False, 1)
    assert again.test.equals(first.test)
    assert (again.metrics, again.history, again.parameters) == (first.metrics, first.history, 3)
    assert again.totals == first.totals == {"optfs/share_dropped": 0.25}


def test_whatever_decides_the_outcome_trains_anew(config, rows, trained, tmp_path):
    base = identity(config, rows)
    model = config.model.model_copy(update={"options": {"cross_layers": 2}})
    changed = [
        identity(config.model_copy(update={"seed": 1}), rows),
        identity(config.model_copy(update={"model": model}), rows),
        identity(config.model_copy(update={"train": config.train.model_copy(update={"epochs": 3})}), rows),
        identity(config, replace(rows, path=rows.path.with_name("def"))),
    ]
    assert len({base, *changed}) == 5


def test_name_workdir_and_tracking_decide_nothing(config, rows):
    other = config.model_copy(
        update={
            "name": "x",
            "workdir": config.workdir / "y",
            "tracking": config.tracking.model_copy(update={"uri": "z"}),
        }
    )
    assert identity(other, rows) == identity(config, rows)


def test_a_training_that_broke_off_goes_on(config, rows, trained, tmp_path, monkeypatch):
    import pipelines.training.trainer as trainer

    whole, resumed = trainer.train, []

    def breaks(config, data, *, run_dir, **options):
        run_dir.mkdir(parents=True)
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "train", breaks)
    with pytest.raises(KeyboardInterrupt):
        run_trial(config, rows, tmp_path / "arm")
    monkeypatch.setattr(
        trainer, "train", lambda *a, resume, **k: resumed.append(resume) or whole(*a, resume=resume, **k)
    )
    assert run_trial(config, rows, tmp_path / "arm").fresh
    assert resumed == [True]


def test_damaged_predictions_are_refused(config, rows, trained, tmp_path):
    run_trial(config, rows, tmp_path / "arm")
    (path,) = (tmp_path / "arm").rglob("test.parquet")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(ArtifactError, match="not those that were written"):
        run_trial(config, rows, tmp_path / "arm")
