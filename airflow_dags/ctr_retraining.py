"""Every day: encode the logs up to that day, train, and promote the new version if it is not worse.

Each task is one call of the command line, so that Airflow lives in an environment of its own and any step can be
run again by hand. Encoded features are named after what went into them and a run after its day: a day that runs
twice finds its own work, and a task that was killed goes on where it was.

Airflow Variables, or environment variables `AIRFLOW_VAR_<NAME>`, say where things are:

| variable              | what                                                 | default                 |
|-----------------------|------------------------------------------------------|-------------------------|
| `sluice_command`      | the `sluice` executable of its own environment       | `sluice`                |
| `sluice_config`       | the run's `ctr.yaml`                                 | `ctr.yaml`              |
| `sluice_model`        | name of the registered model                         | `clicks`                |
| `sluice_workdir`      | features, checkpoints, bundles                       | `runs`                  |
| `sluice_tracking`     | URI of the MLflow store                              | `sqlite:///runs/mlflow.db` |
| `sluice_day`          | the setting that the day decides; `%s` is the day    | `data.options.until=%s` |
| `sluice_max_auc_drop` | AUC that a new champion may lose against the old one | `0.005`                 |
"""

from __future__ import annotations

import datetime
from typing import Any

from airflow.providers.standard.operators.bash import BashOperator
from airflow.sdk import DAG, Asset

ENVIRONMENT = {
    "SLUICE": "{{ var.value.get('sluice_command', 'sluice') }}",
    "CONFIG": "{{ var.value.get('sluice_config', 'ctr.yaml') }}",
    "MODEL": "{{ var.value.get('sluice_model', 'clicks') }}",
    "WORKDIR": "{{ var.value.get('sluice_workdir', 'runs') }}",
    "TRACKING": "{{ var.value.get('sluice_tracking', 'sqlite:///runs/mlflow.db') }}",
    "DAY": "{{ ds }}",
    "DAY_SETTING": "{{ var.value.get('sluice_day', 'data.options.until=%s') % ds }}",
    "MAX_AUC_DROP": "{{ var.value.get('sluice_max_auc_drop', '0.005') }}",
}
SETTINGS = '-c "$CONFIG" -o name="$MODEL" -o workdir="$WORKDIR" -o tracking.uri="$TRACKING" -o "$DAY_SETTING"'

champion = Asset(name="ctr_champion", uri="x-sluice://models/champion")

with DAG(
    dag_id="ctr_retraining",
    doc_md=__doc__,
    schedule="@daily",
    start_date=datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC),
    catchup=False,
    max_active_runs=1,
    default_args={"execution_timeout": datetime.timedelta(hours=6)},
    tags=["sluice"],
) as dag:

    def sluice(task_id: str, command: str, **options: Any) -> BashOperator:
        """Return a task that calls the command line; what comes from Variables is never read as shell code."""
        return BashOperator(
            task_id=task_id, bash_command=f'"$SLUICE" {command}', env=ENVIRONMENT, append_env=True, **options
        )

    features = sluice("features", f"features {SETTINGS}")
    train = sluice("train", f'train {SETTINGS} --run "$DAY"')
    # Exit code 1 says that the new version is worse: the champion stays, and the day is no failure.
    promote = sluice(
        "promote",
        'promote "$MODEL" --run "$DAY" --max-auc-drop "$MAX_AUC_DROP" --tracking-uri "$TRACKING"',
        skip_on_exit_code=1,
        outlets=[champion],
    )
    features >> train >> promote
