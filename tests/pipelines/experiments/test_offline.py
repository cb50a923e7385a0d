from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from ctr_models.errors import ConfigError, DataError
from pipelines.evaluation.metrics import auc, evaluate
from pipelines.experiments.experiment import Experiment
from pipelines.experiments.offline import ArmResult, run_offline

TREE = {
    "name": "depth",
    "control": "flat",
    "arms": [
        {"name": "flat"},
        {"name": "same", "model": {"gates": {"field": "none"}}},
        {"name": "deep", "model": {"cross_layers": 4}},
    ],
    "decision": {"seeds": [5, 6], "resamples": 200},
}


def experiment(**change):
    return Experiment.from_tree({**TREE, **change})


def test_every_arm_is_trained_with_every_seed_on_one_budget(config, rows, trained):
    lines = []
    result = run_offline(experiment(), config, rows, say=lines.append)
    assert [(c.seed, c.model.options["cross_layers"]) for c in trained] == [
        (5, 1),
        (5, 1),
        (5, 4),
        (6, 1),
        (6, 1),
        (6, 4),
    ]
    assert all(c.train == config.train for c in trained)
    assert lines[0] == "1/6 flat, seed 5: trained"
    assert [len(arm.metrics) for arm in result.arms] == [2, 2, 2]


def test_differences_winner_and_best_possible(config, rows, trained):
    result = run_offline(experiment(), config, rows)
    by = {(d.challenger, d.metric): d for d in result.differences}
    flat, same, deep = result.arms
    y = result.label
    expected = np.mean([auc(y, d) - auc(y, f) for d, f in zip(deep.probability, flat.probability, strict=True)])
    assert by["deep", "auc"].value == pytest.approx(expected)
    assert (by["deep", "auc"].verdict, by["deep", "logloss"].verdict) == ("better", "better")
    assert (by["same", "auc"].value, by["same", "auc"].verdict) == (0, "noise")
    assert by["deep", "auc"].clusters == rows.table["__user__"].n_unique()
    assert result.winner == "deep"
    assert result.truth == evaluate(y, rows.table["true_probability"], rows.table["__user__"])
    assert flat.mean("auc") == pytest.approx(np.mean([auc(y, p) for p in flat.probability]))
    assert flat.deviation("auc") == pytest.approx(np.std([auc(y, p) for p in flat.probability], ddof=1))
    assert same.hashes == flat.hashes == deep.hashes


def test_what_the_gates_did_in_the_best_epoch_is_told_as_a_mean_over_the_seeds():
    def history(one, best, last):
        return [
            {"epoch": 1, "gate/cross.0/mean": one, "best": True},
            {"epoch": 2, "gate/cross.0/mean": best, "best": True},
            {"epoch": 3, "gate/cross.0/mean": last, "best": False},
        ]

    histories = [history(0.1, 0.5, 0.9), history(0.2, 0.75, 0.3)]
    arm = ArmResult("a", {}, {}, [{}, {}], histories, [1.0, 1.0], 0, np.zeros((2, 0)))
    assert arm.telemetry() == {"cross.0": {"mean": 0.625}}
    assert ArmResult("a", {}, {}, [{}], [[{"epoch": 1}]], [1.0], 0, np.zeros((1, 0))).telemetry() == {}


def test_a_second_run_trains_nothing_and_finds_the_same(config, rows, trained):
    first = run_offline(experiment(), config, rows)
    count = len(trained)
    lines = []
    again = run_offline(experiment(), config, rows, say=lines.append)
    assert len(trained) == count
    assert all("already trained" in line for line in lines)
    assert again.differences == first.differences


def test_one_more_arm_trains_only_that_arm(config, rows, trained):
    run_offline(experiment(), config, rows)
    count = len(trained)
    more = [*TREE["arms"], {"name": "deeper", "model": {"cross_layers": 6}}]
    run_offline(experiment(arms=more), config, rows)
    assert [c.model.options["cross_layers"] for c in trained[count:]] == [6, 6]


def test_only_the_population_counts(config, rows, trained):
    result = run_offline(experiment(population=[{"column": "country", "values": ["DE"]}]), config, rows)
    inside = (rows.table["country"] == "DE").to_numpy()
    assert len(result.label) == inside.sum() < len(inside)
    assert result.truth == evaluate(
        rows.table["__label__"].to_numpy()[inside],
        rows.table["true_probability"].to_numpy()[inside],
        rows.table["__user__"].to_numpy()[inside],
    )


def test_rows_are_clusters_where_no_user_is_known(config, rows, trained):
    table = rows.table.with_columns(__user__=0)
    result = run_offline(experiment(), config, replace(rows, table=table, truth=None))
    assert not result.clustered
    assert result.differences[0].clusters == len(table)
    assert result.truth is None


def test_result_is_json_and_a_report(config, rows, trained, tmp_path):
    result = run_offline(experiment(), config, rows)
    content = json.loads(json.dumps(result.to_dict()))
    assert content["winner"] == "deep"
    assert content["experiment"]["hash"] == result.experiment.hash
    assert [a["name"] for a in content["arms"]] == ["flat", "same", "deep"]
    assert {d["verdict"] for d in content["differences"]} == {"noise", "better"}
    page = result.write_report(tmp_path / "report.html").read_text()
    for text in ("Experiment depth", "deep: better on auc, within all guardrails.", "best possible", "5, 6"):
        assert text in page


def test_mistakes_show_before_any_training(config, rows, trained):
    arms = [{"name": "flat"}, {"name": "bad", "model": {"cross_layres": 2}}]
    with pytest.raises(ConfigError, match="arm 'bad'"):
        run_offline(experiment(arms=arms), config, rows)
    with pytest.raises(DataError, match=r"no column 'contry' beside the encoded features. add it to features.keep"):
        run_offline(experiment(population=[{"column": "contry", "values": ["DE"]}]), config, rows)
    for values in ([1], ["DE", 1]):
        with pytest.raises(DataError, match=r"population: a condition compares .* \(country is String\)"):
            run_offline(experiment(population=[{"column": "country", "values": values}]), config, rows)
    with pytest.raises(DataError, match="no test row is in the population"):
        run_offline(experiment(population=[{"column": "country", "values": ["IT"]}]), config, rows)
    assert trained == []
