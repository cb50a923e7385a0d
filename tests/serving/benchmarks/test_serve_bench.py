"""The benchmark's own parts; one small run over real servers, MLflow's apart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer

from pipelines.release.example import example_bundle
from serving.benchmarks.serve_bench import main, requests, synthetic


def test_requests_are_random_and_can_be_scored(tmp_path: Path) -> None:
    bundle = example_bundle(tmp_path / "bundle")
    made = requests(bundle, 7)
    assert made == requests(bundle, 7)
    assert len({json.dumps(r) for r in made}) == len(made)
    for one in made:
        assert len(bundle.score_request(**one)) == 7
        assert set(one["user"]) <= {"user_id", "city", "clicked"}


def test_the_bundles_are_what_they_stand_for(tmp_path: Path) -> None:
    from pipelines.release.bundle import Bundle

    small, large = (Bundle.load(path) for path in synthetic(tmp_path))
    assert (small.model.name, len(small.model.schema.fields)) == ("finalmlp", 10)
    assert (large.model.name, len(large.model.schema.fields)) == ("gdcn", 39)


def test_a_run(tmp_path: Path) -> None:
    bundle = example_bundle(tmp_path / "bundle", model={"name": "dnn", "mlp": {"hidden": [8]}})
    out = tmp_path / "figures.json"
    with pytest.raises(typer.Exit):
        main([bundle.directory], 0.1, [1, 2], mlflow=False, events=True, json=out, at_least=["ratio_forward=1e9"])
    told = json.loads(out.read_text())
    figures = told["figures"]
    assert {"ratio_forward", "ratio_forward_small", "1_dnn_p99_half_over_p50"} <= set(figures)
    assert figures["1_dnn_sluice_2_100_rows_per_second"] > 100
    assert len(told["rows"]) == 8
    assert all(row[-1] in ("0", "") for row in told["rows"])
