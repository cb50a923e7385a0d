from __future__ import annotations

import json
from pathlib import Path

import pytest

from ctr_models.errors import ConfigError
from pipelines.config import parse_config
from pipelines.training.tracking import check_reachable, gate_hash, tracking_uri
from pipelines.training.trainer import train


@pytest.fixture(scope="module")
def recorded(world, tmp_path_factory):
    """One run in MLflow's SQLite store, resumed once."""
    folder = tmp_path_factory.mktemp("tracked")
    config = parse_config(
        {
            "name": "tiny",
            "workdir": str(folder),
            "model": {"name": "finalmlp", "mlp1": {"hidden": [8]}, "mlp2": {"hidden": [8]}, "heads": 2},
            "recipe": {"name": "fdo", "options": {"keep": 0.5}},
            "train": {"epochs": 2, "batch_size": 100, "embedding": {"backend": "dense"}},
        }
    )
    result = train(config, world, run_dir=folder / "runs" / "one", progress=False)
    again = train(config, world, run_dir=folder / "runs" / "one", progress=False, resume=True)
    from mlflow import MlflowClient

    return config, result, again, MlflowClient(tracking_uri(config))


def test_parameters_and_tags(recorded):
    config, result, _, client = recorded
    run = client.get_run(result.mlflow_run_id)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "one"
    assert client.get_experiment(run.info.experiment_id).name == "tiny"
    assert run.data.params["train.batch_size"] == "100"
    assert run.data.params["model.name"] == "finalmlp"
    gate = config.model.all_gates["feature"]
    assert run.data.tags["gate.feature"] == f"sigmoid2:{gate.hash}"
    assert run.data.tags["gate_hash"] == gate_hash(config)
    assert run.data.tags["features"] == "0123456789ab"
    assert run.data.tags["seed"] == str(config.seed)


def test_metrics_an_epoch_and_at_the_end(recorded):
    _, result, _, client = recorded
    history = client.get_metric_history(result.mlflow_run_id, "valid_auc")
    by_step = {m.step: m.value for m in history}
    assert by_step == {r["epoch"]: r["valid_auc"] for r in result.history}
    assert client.get_run(result.mlflow_run_id).data.metrics["test_auc"] == pytest.approx(
        result.metrics["test_auc"]
    )
    gate = "gate/inputs.feature_gates.0/mean"
    assert len(client.get_metric_history(result.mlflow_run_id, gate)) == 2


def test_what_the_recipe_reports_is_an_artefact_and_its_totals_are_metrics(recorded):
    _, result, _, client = recorded
    kept = Path(client.download_artifacts(result.mlflow_run_id, "reports.json")).read_text()
    assert json.loads(kept) == {"reports": result.reports}
    metrics = client.get_run(result.mlflow_run_id).data.metrics
    dims, judged = result.reports
    assert metrics["fdo/weights_after"] == dims["rows"][-1]["weights after"]
    for row in judged["rows"]:
        assert metrics[f"phases/{row['phase']}/ece"] == row["ece"]


def test_plots_and_configuration_are_artefacts(recorded):
    _, result, _, client = recorded
    names = {a.path for a in client.list_artifacts(result.mlflow_run_id)}
    names |= {a.path for a in client.list_artifacts(result.mlflow_run_id, "plots")}
    assert {"config.yaml", "plots/learning_curve.png", "plots/calibration.png", "plots/gates.png"} <= names
    kept = Path(client.download_artifacts(result.mlflow_run_id, "config.yaml")).read_text()
    assert kept == (result.run_dir / "config.yaml").read_text()
    assert (result.run_dir / "plots" / "gates.png").read_bytes().startswith(b"\x89PNG")


def test_a_resumed_run_stays_one_run(recorded):
    _, result, again, client = recorded
    assert again.mlflow_run_id == result.mlflow_run_id
    experiment = client.get_run(result.mlflow_run_id).info.experiment_id
    assert len(client.search_runs([experiment])) == 1


def test_a_failed_run_is_marked_so(recorded, world, monkeypatch):
    config, result, _, client = recorded
    from pipelines.training import fit

    monkeypatch.setattr(fit, "judge", lambda *_: (_ for _ in ()).throw(RuntimeError("stop")))
    with pytest.raises(RuntimeError, match="stop"):
        train(config, world, run_dir=config.workdir / "runs" / "two", progress=False)
    experiment = client.get_run(result.mlflow_run_id).info.experiment_id
    assert [r.info.status for r in client.search_runs([experiment]) if r.info.run_name == "two"] == ["FAILED"]


def test_the_screen_stays_quiet(recorded, world, capfd):
    config, *_ = recorded
    train(config, world, run_dir=config.workdir / "runs" / "three", progress=False)
    out, err = capfd.readouterr()
    assert out == ""
    assert "mlflow" not in err.lower()
    assert "alembic" not in err.lower()


def test_a_server_that_does_not_answer_is_named_before_training(world, tmp_path):
    config = parse_config({"workdir": str(tmp_path), "tracking": {"uri": "http://127.0.0.1:9"}})
    with pytest.raises(
        ConfigError, match=r"tracking\.uri: the tracking server http://127\.0\.0\.1:9 does not answer"
    ):
        train(config, world, run_dir=tmp_path / "run", progress=False)
    assert not (tmp_path / "run" / "fit").exists()


def test_a_password_in_the_uri_is_not_told():
    for uri in ("http://me:secret@127.0.0.1:9", "http://me:secret@127.0.0.1:port"):
        with pytest.raises(ConfigError) as caught:
            check_reachable(uri)
        assert "secret" not in str(caught.value)
    config = parse_config({"tracking": {"uri": "http://me:secret@mlflow"}})
    assert config.public().tracking.uri == "http://***@mlflow"
    assert config.public().model_copy(update={"tracking": config.tracking}) == config


def test_local_stores_need_no_server():
    check_reachable("sqlite:///anything.db")
    check_reachable("/tmp/mlruns")
