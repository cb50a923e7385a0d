from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from ctr_models.errors import ConfigError, DataError
from ctr_models.gates import GATES, Gate, register_gate
from ctr_models.model import ModelSpec
from pipelines.datasets.base import RawData, RawPart
from pipelines.datasets.config import SplitConfig
from pipelines.evaluation.metrics import auc
from pipelines.experiments import matrix
from pipelines.experiments.matrix import (
    Study,
    cells_of,
    dealt,
    differences,
    frame_of,
    some_users,
    summary,
    telemetry_of,
)
from pipelines.experiments.statistics import compare
from pipelines.experiments.trial import Trial
from pipelines.features.spec import FeatureSpec

COST = {"flops_per_row": 10.0, "milliseconds": 2.0, "slots": {"cross.gates.0": "cross"}}


@pytest.fixture
def half() -> Iterator[str]:
    """A gate of the user's, registered and nothing else."""

    @register_gate("half")
    class Half(Gate):
        slots = frozenset({"cross", "fusion"})

        def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
            return torch.full_like(x, 0.5)

    yield "half"
    del GATES._classes["half"]


@pytest.fixture
def study(config, rows, trained, tmp_path, monkeypatch) -> Study:
    """GDCN's cross slot, whose trainings are instant."""
    monkeypatch.setattr(matrix, "measure", lambda config, data: COST)
    cells = cells_of(config.model, slots=["cross"])
    return Study("gdcn", config, rows, tuple(cells), (1, 2), tmp_path / "gdcn")


def labels(spec: str | dict, **given) -> list[str]:
    return [cell.label for cell in cells_of(ModelSpec.parse(spec), **given)]


def test_every_registered_gate_stands_in_every_slot_that_it_fits():
    found = labels("finalmlp")
    assert found == [
        f"{slot}: {gate}"
        for slot in ("field", "feature", "fusion")
        for gate in ["none", *(n for n in GATES if n != "none" and slot in GATES[n].slots)]
    ]
    assert len(found) == len(set(found))


def test_a_gate_of_the_users_appears_by_being_registered(half):
    assert {"cross: half"} == {c for c in labels("gdcn") if "half" in c}
    assert {"fusion: half"} == {c for c in labels("finalmlp") if "half" in c}


def test_the_control_is_none_but_where_nothing_is_neutral():
    cells = cells_of(ModelSpec(name="aw_moe"))
    controls = {cell.slot: cell.control for cell in cells}
    neutral = dict.fromkeys(("sequence", "field", "feature"), "none")
    assert controls == {"expert": "attention_weighted", **neutral}
    assert sum(cell.is_control for cell in cells) == len(controls)
    assert "expert: none" in [cell.label for cell in cells if not cell.is_control]


def test_a_cell_changes_one_slot_and_the_models_own_gate_keeps_its_settings():
    gate = {"name": "sigmoid2", "context": ["user", "item"], "hidden": [4]}
    spec = ModelSpec.parse({"name": "finalmlp", "gates": {"feature": gate}})
    cells = {cell.label: cell.spec for cell in cells_of(spec)}
    assert cells["feature: sigmoid2"].gates == spec.all_gates
    assert cells["field: sigmoid2"].gates["field"].options == {}
    changed = cells["fusion: sigmoid"].gates
    assert {slot for slot in changed if changed[slot] != spec.all_gates[slot]} == {"fusion"}


def test_slots_and_gates_can_be_narrowed_and_controls_stay():
    assert labels("gdcn", slots=["field", "cross"], gates=["mixer", "sigmoid"]) == [
        *("field: none", "field: mixer", "cross: none", "cross: sigmoid")
    ]
    assert labels("gdcn", gates=["recency"]) == []


def test_cells_of_one_configuration_are_one_training(study, config):
    whole = replace(study, cells=tuple(cells_of(config.model)))
    controls_alike = 2  # field: none and feature: none are the model as it is, which is cross: sigmoid
    assert len(whole.jobs) == 2 * (len(whole.cells) - controls_alike)
    assert len({job.folder for job in whole.jobs}) == len(whole.jobs)
    assert {whole.job(cell, seed).folder for cell in whole.cells for seed in (1, 2)} == {
        job.folder for job in whole.jobs
    }


@pytest.mark.parametrize("parts", [1, 2, 3, 50])
def test_each_training_falls_to_exactly_one_part(study, parts):
    hands = [dealt(study.jobs, part, parts) for part in range(1, parts + 1)]
    assert sorted(str(job) for hand in hands for job in hand) == sorted(map(str, study.jobs))
    assert max(map(len, hands)) - min(map(len, hands)) <= 1


def test_a_killed_run_goes_on_where_it_was(study, trained, monkeypatch):
    import pipelines.training.trainer as trainer

    whole = trainer.train

    def killed(config, data, **options):
        if len(trained) == 3:
            raise KeyboardInterrupt
        return whole(config, data, **options)

    monkeypatch.setattr(trainer, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        [job.run() for job in study.jobs]
    monkeypatch.setattr(trainer, "train", whole)
    assert [job.is_done for job in study.jobs] == [True] * 3 + [False] * 3
    assert all(job.run() is not None for job in study.jobs)
    assert len(trained) == 6
    assert len({(c.model.gates["cross"].name, c.seed) for c in trained}) == 6


def test_a_failure_is_told_ends_nothing_and_is_tried_again(study, trained, monkeypatch):
    import pipelines.training.trainer as trainer

    whole = trainer.train

    def refuses(config, data, **options):
        if config.model.gates["cross"].name == "recursive":
            raise ConfigError("no such width", where="model.gates.cross", remedy="take another")
        return whole(config, data, **options)

    monkeypatch.setattr(trainer, "train", refuses)
    found = [job.run() for job in study.jobs]
    assert [trial is None for trial in found] == ["recursive" in str(job) for job in study.jobs]
    frame = frame_of([study])
    assert frame["status"].to_list() == ["trained", "trained", "failed", "failed", "trained", "trained"]
    assert frame.filter(status="failed")["error"][0].startswith("ConfigError: model.gates.cross: no such width")
    table = summary(study, frame, differences(study, resamples=200))
    assert table.filter(gate="recursive").select("trained", "auc_value").row(0) == (0, None)
    assert table.filter(gate="sigmoid")["auc_verdict"][0] is not None

    monkeypatch.setattr(trainer, "train", whole)
    assert all(job.run() is not None for job in study.jobs)
    assert frame_of([study])["error"].null_count() == 6


def test_what_is_not_trained_with_all_seeds_is_not_compared(study):
    assert frame_of([study])["status"].to_list() == ["missing"] * 6
    assert differences(study) == []
    assert summary(study, frame_of([study]), [])["auc_value"].to_list() == [None] * 3
    for job in study.jobs[:-1]:
        job.run()
    assert {d.challenger for d in differences(study, resamples=200)} == {"cross: recursive"}


def test_differences_are_those_of_a_hand_computation(study):
    for job in study.jobs:
        job.run()
    found = {d.challenger: d for d in differences(study, metrics=["auc"], resamples=200)}
    tests = {c.label: [study.job(c, seed).read().test for seed in study.seeds] for c in study.cells}
    by_hand = {
        name: np.mean(
            [
                auc(one["label"], one["probability"]) - auc(other["label"], other["probability"])
                for one, other in zip(own, tests["cross: none"], strict=True)
            ]
        )
        for name, own in tests.items()
    }
    first = tests["cross: none"][0]
    expected = compare(
        first["label"], first["user"], {n: [t["probability"] for t in own] for n, own in tests.items()},
        control="cross: none", metrics=["auc"], resamples=200,
    )  # fmt: skip
    assert list(found.values()) == expected
    for name, d in found.items():
        assert d.value == pytest.approx(by_hand[name], abs=1e-12)
        assert (d.seeds, d.control) == (2, "cross: none")


def test_a_summary_has_means_costs_beside_the_control_and_the_choice_of_the_valid_rows(study):
    for job in study.jobs:
        job.run()
    frame = frame_of([study])
    of_gate = {"none": 0.8, "recursive": 0.9, "sigmoid": 0.85}
    frame = frame.with_columns(
        test_auc=pl.when(seed=1).then(0.6).otherwise(0.8),
        valid_auc=pl.col("gate").replace_strict(of_gate),
        rows_per_second=pl.when(gate="sigmoid").then(500.0).otherwise(1000.0),
        milliseconds=pl.when(gate="sigmoid").then(2.0 + pl.col("seed")).otherwise(2.0),
    )
    table = summary(study, frame, differences(study, resamples=200))
    sigmoid = table.filter(gate="sigmoid").to_dicts()[0]
    assert sigmoid["test_auc"] == pytest.approx(0.7)
    assert sigmoid["test_auc_sd"] == pytest.approx(0.02**0.5)
    assert (sigmoid["rows_per_second_ratio"], sigmoid["milliseconds"], sigmoid["milliseconds_ratio"]) == (
        0.5,
        3,
        1.5,
    )
    assert table["gate"].filter(table["chosen"]).to_list() == ["recursive"]


def test_other_test_rows_are_refused(study, rows):
    for job in study.jobs:
        job.run()
    job = study.jobs[-1]
    other = job.read().test.with_columns(pl.col("row") + 1)
    trials = {j.folder: j.read() for j in study.jobs}
    trials[job.folder] = replace(trials[job.folder], test=other)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matrix.Job, "read", lambda self: trials[self.folder])
        with pytest.raises(DataError, match=r"cross: sigmoid: its test rows are not those of the others"):
            differences(study)


def test_telemetry_is_of_the_weights_that_were_kept():
    history = [
        {"best": True, "gate/a/mean": 0.1, "gate/b/mean": 0.2},
        {"best": True, "gate/a/mean": 0.3, "gate/b/mean": 0.4},
        {"best": False, "gate/a/mean": 0.5, "gate/b/mean": 0.6},
    ]
    trial = Trial(pl.DataFrame(), {}, history, 1.0, 1, {}, fresh=False)
    assert telemetry_of(trial, {"a": "field", "b": "cross"}, "cross") == {"b": {"mean": 0.4}}


def raw(user: str | None = "who") -> RawData:
    rng = np.random.default_rng(0)
    parts = {
        name: RawPart(pl.LazyFrame({"who": rng.integers(0, 40, 300), "order": np.arange(300)}), Path(name))
        for name in ("train", "valid", "test")
    }
    spec = FeatureSpec(label="click", user=user, columns=({"name": "who", "kind": "categorical"},))
    return RawData(parts, SplitConfig(by="given"), spec, "print")


def test_a_share_of_the_users_keeps_all_of_their_rows_in_order():
    whole, some = raw(), some_users(raw(), 0.25, seed=3)
    users = pl.concat([part.frame for part in some.parts.values()]).collect()["who"].unique()
    assert len(users) == 10
    for name, part in some.parts.items():
        expected = whole.parts[name].frame.collect().filter(pl.col("who").is_in(users.to_list()))
        assert part.frame.collect().equals(expected)
    assert some.fingerprint != whole.fingerprint
    assert some_users(whole, 0.25, seed=4).fingerprint != some.fingerprint
    assert some_users(whole, 1.0, seed=3) is whole


def test_a_share_of_no_users_is_refused():
    with pytest.raises(ConfigError, match="names no user"):
        some_users(raw(user=None), 0.5, seed=0)
