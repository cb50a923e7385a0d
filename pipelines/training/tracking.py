"""What is recorded of a run, in MLflow."""

from __future__ import annotations

import hashlib
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

from pydantic import BaseModel, ConfigDict

from ctr_models.errors import ConfigError
from pipelines.features.files import atomic_write

if TYPE_CHECKING:
    from pipelines.config import RunConfig
    from pipelines.evaluation.ranking import Rankings
    from pipelines.features.prepare import EncodedData
    from pipelines.training.distributed import Ranks
    from pipelines.training.predict import Predictions

RUN_ID = "mlflow_run_id"
TIMEOUT_SECONDS = 5.0


class TrackingConfig(BaseModel):
    """Where runs are recorded."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    enabled: bool = True
    uri: str | None = None
    """Any MLflow tracking URI; None: SQLite and files under the work directory."""
    experiment: str | None = None
    """None: the run's name."""
    system_metrics: bool = True


def tracking_uri(config: RunConfig) -> str:
    """Return the URI of the tracking store.

    Example:
        >>> from pipelines.config import parse_config
        >>> tracking_uri(parse_config({"tracking": {"uri": "http://mlflow:5000"}}))
        'http://mlflow:5000'
    """
    from pipelines.release.store import default_uri

    return config.tracking.uri or default_uri(config.workdir)


class Tracker:
    """Records nothing; what a run without tracking, or a rank other than the first, gets."""

    run_id: str | None = None

    def epoch(self, record: dict[str, Any]) -> None:
        """Record an epoch's metrics."""

    def finish(self, result: dict[str, Any], test: Predictions | Rankings) -> None:
        """Record the result and its plots.

        Args:
            result: what ``result.json`` holds of the run.
            test: of the test rows.
        """

    def close(self, status: str) -> None:
        """End the record."""


@contextmanager
def open_tracker(
    config: RunConfig, data: EncodedData, run_dir: Path, me: Ranks, resume: bool = False
) -> Iterator[Tracker]:
    """Record a run for as long as the block lasts; an exception marks it as failed.

    Raises:
        ConfigError: the tracking server does not answer.
    """
    if not (config.tracking.enabled and me.first):
        yield Tracker()
        return
    uri = tracking_uri(config)
    check_reachable(uri)
    tracker = MlflowTracker(config, data, run_dir, uri, resume)
    try:
        yield tracker
    except BaseException as error:
        tracker.close("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise
    tracker.close("FINISHED")


def check_reachable(uri: str) -> None:
    """Ask a tracking server for its health, so that a wrong address shows before hours of training.

    Raises:
        ConfigError: it does not answer within five seconds.
    """
    if urlparse(uri).scheme not in ("http", "https"):
        return
    import httpx

    from pipelines.release.store import shown

    try:
        httpx.get(f"{uri.rstrip('/')}/health", timeout=TIMEOUT_SECONDS).raise_for_status()
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ConfigError(
            f"the tracking server {shown(uri)} does not answer ({shown(str(error))})",
            where="tracking.uri",
            remedy="start it, correct the address, or set tracking.enabled=false",
        ) from None


class MlflowTracker(Tracker):
    """Records a run in MLflow from a thread of its own: its first use takes seconds that training need not wait.

    Args:
        config: of the run.
        data: encoded features.
        run_dir: keeps the run's id, for resuming.
        uri: of the tracking store.
        resume: go on with the run whose id stands in ``run_dir``.
    """

    def __init__(self, config: RunConfig, data: EncodedData, run_dir: Path, uri: str, resume: bool) -> None:
        self._config, self._data, self._run_dir, self._uri = config, data, run_dir, uri
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sluice-mlflow")
        self._pending: list[Future] = []
        self._client: Any = None
        self._monitor: Any = None
        self._seen: set[tuple[str, int]] = set()
        self._do(lambda: self._start(resume))

    def _do(self, work: Callable[[], None]) -> None:
        for done in [f for f in self._pending if f.done()]:
            self._pending.remove(done)
            done.result()
        self._pending.append(self._thread.submit(work))

    def _start(self, resume: bool) -> None:
        from pipelines.release.store import connect, experiment_id

        self._client = connect(self._uri)
        marker = self._run_dir / RUN_ID
        if resume and marker.exists():
            self.run_id = marker.read_text().strip()
            self._client.update_run(self.run_id, status="RUNNING")
        else:
            name = self._config.tracking.experiment or self._config.name
            experiment = experiment_id(self._client, self._uri, name)
            run = self._client.create_run(experiment, run_name=self._run_dir.name, tags=self._tags())
            self.run_id = run.info.run_id
            atomic_write(marker, str(self.run_id))
            self._params()
        if self._config.tracking.system_metrics:
            from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

            self._monitor = SystemMetricsMonitor(self.run_id, resume_logging=resume, tracking_uri=self._uri)
            self._monitor.start()

    def _tags(self) -> dict[str, str]:
        gates = self._config.model.all_gates
        tags = {
            "model": self._config.model.name,
            "features": self._data.state.hash,
            "seed": str(self._config.seed),
            "run_dir": str(self._run_dir),
            "gate_hash": gate_hash(self._config),
            **{f"gate.{slot}": f"{gate.name}:{gate.hash}" for slot, gate in sorted(gates.items())},
        }
        commit = _commit()
        return {**tags, "mlflow.source.git.commit": commit} if commit else tags

    def _params(self) -> None:
        from mlflow.entities import Param

        flat = flatten(self._config.model_dump(mode="json", exclude={"workdir", "features", "tracking"}))
        params = [Param(k, str(v)[:6000]) for k, v in flat.items()]
        for start in range(0, len(params), 100):
            self._client.log_batch(self.run_id, params=params[start : start + 100])

    def epoch(self, record: dict[str, Any]) -> None:
        """Record an epoch's metrics and what its gates do."""
        values = {k: v for k, v in record.items() if k not in ("epoch", "best")}
        self._do(lambda: self._metrics(values, record["epoch"]))

    def _metrics(self, values: dict[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self.run_id, metrics=[Metric(k, float(v), now, step) for k, v in values.items()])

    def finish(self, result: dict[str, Any], test: Predictions | Rankings) -> None:
        """Record the final metrics, the recipe's reports and their totals, the configuration and the plots."""

        def work() -> None:
            from pipelines.config import dump_config
            from pipelines.evaluation.plots import learning_curve, reliability_plot, telemetry_plot
            from pipelines.evaluation.ranking import Rankings

            final = {**result["metrics"], **{key: result[key] for key in ("best_epoch", "rows_per_second")}}
            for told in result["reports"]:
                final |= told.get("totals", {})
            self._metrics(final, result["best_epoch"])
            self._client.log_text(self.run_id, dump_config(self._config.public()), "config.yaml")
            if result["slices"]:
                self._client.log_dict(self.run_id, result["slices"], "slices.json")
            if result["reports"]:
                self._client.log_dict(self.run_id, {"reports": result["reports"]}, "reports.json")
            history = result["history"]
            figures = {"learning_curve": learning_curve(history)}
            if not isinstance(test, Rankings):
                figures["calibration"] = reliability_plot(test.label, test.probability)
            if any(key.startswith("gate/") for key in history[-1]):
                figures["gates"] = telemetry_plot(history)
            for name, figure in figures.items():
                file = self._run_dir / "plots" / f"{name}.png"
                file.parent.mkdir(exist_ok=True)
                figure.savefig(file, dpi=120)
                self._client.log_artifact(self.run_id, str(file), "plots")

        self._do(work)
        self._wait()

    def _wait(self) -> None:
        while self._pending:
            self._pending.pop(0).result()

    def close(self, status: str) -> None:
        """End the run in MLflow. After a failure, trouble with the record does not hide the failure."""

        def work() -> None:
            if self._monitor is not None:
                self._monitor.finish()
            if self.run_id is not None:
                self._client.set_terminated(self.run_id, status)

        try:
            self._pending.append(self._thread.submit(work))
            self._wait()
        except Exception as error:
            if status == "FINISHED":
                raise
            warnings.warn(f"the run could not be closed in MLflow: {error}", stacklevel=2)
        finally:
            self._thread.shutdown()


def gate_hash(config: RunConfig) -> str:
    """Return one hash over the gates in all slots.

    Example:
        >>> from pipelines.config import parse_config
        >>> len(gate_hash(parse_config({"model": {"name": "gdcn"}})))
        12
    """
    gates = sorted(config.model.all_gates.items())
    return hashlib.sha256(" ".join(f"{slot}={gate.hash}" for slot, gate in gates).encode()).hexdigest()[:12]


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested mappings by dotted path.

    Example:
        >>> flatten({"train": {"epochs": 2}, "seed": 1})
        {'train.epochs': 2, 'seed': 1}
    """
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found.update(flatten(value, f"{prefix}.{key}" if prefix else str(key)))
    return found


def _commit() -> str | None:
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
