"""Every day: encode the logs up to that day, train, and promote the new version if it is not worse.

Each task is one call of the command line, so that Airflow lives in an environment of its own and any step can
be run again by hand. Encoded features and trained runs are named after what went into them: a day that runs
twice finds its own work and registers nothing twice.

Airflow Variables (or environment variables ``AIRFLOW_VAR_<NAME>``) say where things are:

===================  ====================================================  ================================
variable             what                                                  default
===================  ====================================================  ================================
sluice_command       the ``sluice`` executable of its own environment      ``sluice``
sluice_config        the run's ``ctr.yaml``                                ``ctr.yaml``
sluice_workdir       features, checkpoints, bundles, default MLflow store  ``runs``
sluice_day_override  the setting that the day decides; ``%s`` is the day   ``data.options.until=%s``
===================  ====================================================  ================================
"""

from __future__ import annotations

import datetime

from airflow.providers.standard.operators.bash import BashOperator
from airflow.sdk import DAG, Asset

ENVIRONMENT = {
    "SLUICE": "{{ var.value.get('sluice_command', 'sluice') }}",
    "CONFIG": "{{ var.value.get('sluice_config', 'ctr.yaml') }}",
    "WORKDIR": "{{ var.value.get('sluice_workdir', 'runs') }}",
    "DAY_OVERRIDE": "{{ var.value.get('sluice_day_override', 'data.options.until=%s') % ds }}",
}
RUN = '-c "$CONFIG" -o workdir="$WORKDIR" -o "$DAY_OVERRIDE"'

champion = Asset(name="ctr_model", uri="x-sluice://models/champion")

with DAG(
    dag_id="ctr_retraining",
    doc_md=__doc__,
    schedule="@daily",
    start_date=datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC),
    catchup=False,
    max_active_runs=1,
    default_args={"retries": 1, "retry_delay": datetime.timedelta(minutes=5)},
    tags=["sluice"],
) as dag:
    features = BashOperator(
        task_id="features",
        bash_command=f'"$SLUICE" features {RUN}',
        env=ENVIRONMENT,
        append_env=True,
    )
    train = BashOperator(
        task_id="train",
        bash_command=f'"$SLUICE" train {RUN} --json "$WORKDIR/train-{{{{ ds }}}}.json"',
        env=ENVIRONMENT,
        append_env=True,
    )
    # Exit code 1 says that the new version is worse: the champion stays, and the day is no failure.
    promote = BashOperator(
        task_id="promote",
        bash_command='"$SLUICE" promote -c "$CONFIG" -o workdir="$WORKDIR" --json -',
        env=ENVIRONMENT,
        append_env=True,
        skip_on_exit_code=1,
        outlets=[champion],
    )
    features >> train >> promote
