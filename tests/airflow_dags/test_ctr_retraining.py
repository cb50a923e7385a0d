from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DAG = ROOT / "airflow_dags" / "ctr_retraining.py"
DAY = "2026-01-10"


def test_the_dag_imports_only_airflow_and_the_standard_library() -> None:
    modules = set()
    for node in ast.walk(ast.parse(DAG.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add((node.module or "").partition(".")[0])
    assert "airflow" in modules
    assert modules <= {"airflow", *sys.stdlib_module_names}


@pytest.mark.airflow
@pytest.mark.timeout(900)
def test_one_day_registers_one_version_however_often_it_runs(airflow_venv: Path, tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path}/runs/mlflow.db"
    environment = {
        **os.environ,
        "AIRFLOW_HOME": str(tmp_path / "airflow"),
        "AIRFLOW__CORE__DAGS_FOLDER": str(DAG.parent),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "false",
        "AIRFLOW__CORE__UNIT_TEST_MODE": "false",
        "AIRFLOW_VAR_SLUICE_COMMAND": str(Path(sys.executable).with_name("sluice")),
        "AIRFLOW_VAR_SLUICE_CONFIG": str(Path(__file__).with_name("ctr.yaml")),
        "AIRFLOW_VAR_SLUICE_MODEL": "daily",
        "AIRFLOW_VAR_SLUICE_WORKDIR": str(tmp_path / "runs"),
        "AIRFLOW_VAR_SLUICE_TRACKING": store,
    }
    airflow = str(airflow_venv / "bin" / "airflow")

    def run(*arguments: str) -> None:
        done = subprocess.run(
            [airflow, *arguments], env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]

    run("db", "migrate")
    run("dags", "test", "ctr_retraining", DAY)
    run("dags", "test", "ctr_retraining", DAY)

    from pipelines.release.registry import releases

    (release,) = releases("daily", store)
    assert (release.version, release.run, release.aliases) == (1, DAY, ("champion",))
    print(f"\nairflow dags test ctr_retraining {DAY}: models:/daily/1 registered, champion, once for two runs")
