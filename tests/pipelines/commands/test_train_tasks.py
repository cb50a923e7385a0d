"""Two tasks from the page's configuration, from raw logs to a bundle that serves the click."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner

from pipelines.cli import build_app
from pipelines.release.bundle import Bundle

PAGE = Path(__file__).parents[3] / "docs" / "models" / "mmoe.md"
SMALL = {
    "data.options.rows": 4000,
    "data.options.users": 60,
    "data.options.items": 50,
    "data.options.conversion_rate": 0.4,
    "train.epochs": 2,
    "train.batch_size": 200,
    "train.threads": 1,
    "tracking.system_metrics": "false",
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The result as JSON, and what was printed."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "ctr.yaml").write_text(re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)[0])
    small = {**SMALL, "workdir": folder / "work", "data.path": folder / "world"}
    overrides = [word for key, value in small.items() for word in ("-o", f"{key}={value}")]
    command = ["train", "-c", str(folder / "ctr.yaml"), *overrides, "--json", str(folder / "result.json")]
    done = CliRunner().invoke(build_app(), command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads((folder / "result.json").read_text()), done.output


def test_every_task_has_its_metrics_and_its_best(trained):
    result, output = trained
    for split in ("valid", "test"):
        for name in ("auc", "logloss", "ne", "ece"):
            assert {f"{split}_{name}", f"{split}_{name}_conversion"} <= set(result["metrics"])
            assert f"{split}_{name}_conversion" in result["best_possible"]
    assert result["best_possible"]["test_logloss_conversion"] < result["metrics"]["test_logloss_conversion"]
    row = next(line for line in output.splitlines() if "AUC, conversion" in line and "GAUC" not in line)
    for figures in (result["metrics"], result["best_possible"]):
        assert f"{figures['test_auc_conversion']:.5f}" in row


def test_they_are_tracked_by_epoch(trained):
    from mlflow import MlflowClient

    result, _ = trained
    work = Path(result["run_dir"]).parents[1]
    client = MlflowClient(tracking_uri=f"sqlite:///{work / 'mlflow.db'}")
    seen = client.get_metric_history(result["mlflow_run_id"], "valid_auc_conversion")
    assert {m.step for m in seen} == {1, 2}
    assert client.get_run(result["mlflow_run_id"]).data.metrics["test_auc_conversion"] == pytest.approx(
        result["metrics"]["test_auc_conversion"]
    )


def test_the_bundle_serves_the_click_without_any_label(trained):
    result, _ = trained
    bundle = Bundle.load(Path(result["bundle"]))  # replays its golden rows
    assert bundle.model.tasks == ("conversion",)
    rows = bundle.golden.select(bundle.state.spec.request_columns)
    assert not {"click", "conversion"} & set(rows.columns)
    batch = bundle.score_frame(rows)
    np.testing.assert_allclose(bundle.score_request({}, {}, rows.to_dicts()), batch, atol=1e-6)
    labelled = rows.with_columns(click=pl.lit(1), conversion=pl.lit(0))
    np.testing.assert_array_equal(bundle.score_frame(labelled), batch)
