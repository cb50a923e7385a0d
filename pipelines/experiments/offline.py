"""The offline half of an experiment: every arm and seed on the same rows, compared on the test rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from ctr_models.errors import DataError, nearest
from pipelines.config import RunConfig
from pipelines.evaluation.metrics import evaluate
from pipelines.evaluation.plots import gates_of
from pipelines.experiments.experiment import Experiment
from pipelines.experiments.report import ReportArm, write_report
from pipelines.experiments.statistics import Difference, compare
from pipelines.experiments.trial import Trial, run_trial

if TYPE_CHECKING:
    from pipelines.features.prepare import EncodedData


@dataclass(frozen=True)
class ArmResult:
    """What training an arm with every seed came to; lists are in the order of the seeds.

    Args:
        name: of the arm.
        gates: the gate in each slot, by slot.
        hashes: their hashes.
        metrics: of the population's test rows, ``auc``, ``logloss``, ``gauc``, ``ne``, ``ece``.
        histories: one record an epoch.
        rows_per_second: training speed.
        parameters: trained numbers.
        probability: predictions of the population's test rows, (S, N).
    """

    name: str
    gates: dict[str, str]
    hashes: dict[str, str]
    metrics: list[dict[str, float]]
    histories: list[list[dict[str, Any]]]
    rows_per_second: list[float]
    parameters: int
    probability: np.ndarray

    def mean(self, metric: str) -> float:
        """Return a test metric's mean over the seeds."""
        return float(np.mean([m[metric] for m in self.metrics]))

    def deviation(self, metric: str) -> float:
        """Return a test metric's standard deviation over the seeds; 0 for one seed."""
        values = [m[metric] for m in self.metrics]
        return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0

    def telemetry(self) -> dict[str, dict[str, float]]:
        """Return what each gate did in the best epoch, by its path in the model: means over the seeds."""
        best = [gates_of(next((r for r in reversed(h) if r.get("best")), h[-1])) for h in self.histories]
        return {
            path: {figure: float(np.mean([one[path][figure] for one in best])) for figure in figures}
            for path, figures in best[0].items()
        }


@dataclass(frozen=True)
class OfflineResult:
    """An experiment's outcome offline.

    Args:
        experiment: what was asked.
        label: of the population's test rows, (N,).
        arms: in the experiment's order.
        differences: of each challenger from the control.
        winner: by the experiment's rule.
        reasons: a sentence for each challenger.
        truth: metrics of the true click probability, where the data know it.
        clustered: whether intervals resample users; false where the data name none.
    """

    experiment: Experiment
    label: np.ndarray
    arms: list[ArmResult]
    differences: list[Difference]
    winner: str
    reasons: list[str]
    truth: dict[str, float] | None
    clustered: bool

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {
            "experiment": {**self.experiment.to_tree(), "hash": self.experiment.hash},
            "rows": len(self.label),
            "arms": [
                {
                    "name": arm.name,
                    "gates": arm.gates,
                    "gate_hashes": arm.hashes,
                    "parameters": arm.parameters,
                    "test": {m: {"mean": arm.mean(m), "sd": arm.deviation(m)} for m in arm.metrics[0]},
                    "seeds": arm.metrics,
                    "rows_per_second": arm.rows_per_second,
                    "telemetry": arm.telemetry(),
                }
                for arm in self.arms
            ],
            "differences": [asdict(d) for d in self.differences],
            "winner": self.winner,
            "reasons": self.reasons,
            "best_possible": self.truth,
        }

    def write_report(self, path: Path) -> Path:
        """Write the HTML report and return its absolute path. Plots show the first seed."""
        e = self.experiment
        return write_report(
            path,
            f"Experiment {e.name}",
            [
                ReportArm(
                    arm.name,
                    {m: arm.mean(m) for m in arm.metrics[0]},
                    history=arm.histories[0],
                    predictions=(self.label, arm.probability[0]),
                    gates=arm.gates,
                    rows_per_second=float(np.mean(arm.rows_per_second)),
                )
                for arm in self.arms
            ],
            differences=self.differences,
            truth_metrics=self.truth,
            notes=[
                *(f"{reason}." for reason in self.reasons),
                "Metrics are means over the seeds; curves and calibration show the first. Every arm was trained on "
                "the same rows, its epoch chosen on the valid rows, and the test rows were read once.",
            ],
            summary={
                "Experiment": f"{e.name}, {e.hash}",
                "Control": e.control,
                "Winner": self.winner,
                "Primary metric": e.primary,
                "Seeds": ", ".join(map(str, e.decision.seeds)),
                "Test rows": f"{len(self.label):,}",
                "Clusters": "users" if self.clustered else "rows",
            },
        )


def run_offline(
    experiment: Experiment,
    config: RunConfig,
    data: EncodedData | None = None,
    *,
    progress: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> OfflineResult:
    """Train every arm with every seed on the same encoded rows and compare them.

    A finished (arm, seed) is kept under ``<workdir>/experiments/<experiment>/`` and not trained again as long as
    rows, model and training settings are the same.

    Args:
        experiment: arms, seeds, metrics, rule.
        config: rows, budget and the model that arms change.
        data: encoded rows; None prepares those of ``config``.
        progress: show training progress on stderr.
        say: told a line after each training.

    Raises:
        ConfigError: an arm's model can't be built.
        DataError: no row is in the population, or a condition names a column that was not kept.
    """
    configs = {arm.name: arm.apply(config) for arm in experiment.arms}  # a typo shows before any work
    if data is None:
        from pipelines.datasets.base import open_data
        from pipelines.features.prepare import prepare

        raw = open_data(config.data)
        data = prepare(raw, config.features, workdir=config.workdir, seed=config.seed, progress=progress)
    population, truth = _population(experiment, data)
    total, done = len(experiment.arms) * len(experiment.decision.seeds), 0
    folder = config.workdir / "experiments" / experiment.name
    trials: dict[str, list[Trial]] = {arm.name: [] for arm in experiment.arms}
    for seed in experiment.decision.seeds:
        for arm in experiment.arms:
            done += 1
            one = configs[arm.name].model_copy(update={"seed": seed})
            trial = run_trial(one, data, folder / arm.name, progress=progress)
            trials[arm.name].append(trial)
            say(f"{done}/{total} {arm.name}, seed {seed}: " + ("trained" if trial.fresh else "already trained"))
    first = trials[experiment.control][0].test
    label = first["label"].to_numpy()[population]
    user = first["user"].to_numpy()[population]
    clustered = experiment.decision.cluster == "user" and bool((user != user[0]).any())
    probability = {
        name: np.stack([trial.test["probability"].to_numpy()[population] for trial in own])
        for name, own in trials.items()
    }
    differences = compare(
        label,
        user if clustered else np.arange(len(label)),
        probability,
        control=experiment.control,
        metrics=experiment.metrics,
        alpha=experiment.decision.alpha,
        resamples=experiment.decision.resamples,
    )
    winner, reasons = experiment.decide(differences)
    arms = []
    for arm in experiment.arms:
        spec, own = arm.spec(config.model), trials[arm.name]
        arms.append(
            ArmResult(
                arm.name,
                {slot: gate.name for slot, gate in sorted(spec.all_gates.items())},
                arm.gates(config.model),
                [evaluate(label, p, user) for p in probability[arm.name]],
                [trial.history for trial in own],
                [trial.rows_per_second for trial in own],
                own[0].parameters,
                probability[arm.name],
            )
        )
    best = None if truth is None else evaluate(label, truth[population], user)
    return OfflineResult(experiment, label, arms, differences, winner, reasons, best, clustered)


def _population(experiment: Experiment, data: EncodedData) -> tuple[np.ndarray, np.ndarray | None]:
    """Return which test rows count, (N,) booleans, and the true probability of all of them where it is known."""
    frame = data.frame("test")
    known = frame.collect_schema().names()
    for condition in experiment.population:
        if condition.column not in known:
            raise DataError(
                f"no column {condition.column!r} beside the encoded features",
                where=f"experiment {experiment.name}: population",
                remedy=f"add it to features.keep; {nearest(condition.column, known)}",
            )
    truth = [] if data.truth is None else [pl.col(data.truth).cast(pl.Float64).alias("__truth__")]
    try:
        mask = pl.all_horizontal(pl.lit(True), *(c.expression() for c in experiment.population))
        found = frame.select(mask.alias("__in__"), *truth, pl.col("__row__")).collect()
    except (pl.exceptions.PolarsError, TypeError):
        types = ", ".join(f"{c.column} is {frame.collect_schema()[c.column]}" for c in experiment.population)
        raise DataError(
            f"a condition compares a column with values of another type ({types})",
            where=f"experiment {experiment.name}: population",
            remedy="write text as text and numbers as numbers",
        ) from None
    population = found["__in__"].to_numpy()
    if not population.any():
        raise DataError(
            "no test row is in the population",
            where=f"experiment {experiment.name}: population",
            remedy="widen the conditions",
        )
    return population, found["__truth__"].to_numpy() if truth else None
