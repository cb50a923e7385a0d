"""A gate matrix: every gate in every slot of a model, one at a time, trained alike and held against a control.

A cell is a model with its settings as they are and one gate in one slot. Its control is the same model with gate
``none`` there; in the slots that weigh choices (expert, interaction) nothing is neutral, ``none`` being a mixture
of equal shares, and the control is the gate that the model has there anyway. Cells that come to one configuration
are one training, which :func:`pipelines.experiments.trial.run_trial` keeps.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from ctr_models.errors import ConfigError, DataError
from ctr_models.gates.base import GATES, Gate, GateSpec
from ctr_models.gates.probe import WEIGHING
from ctr_models.model import MODELS, ModelSpec
from pipelines.config import RunConfig
from pipelines.evaluation.metrics import evaluate
from pipelines.evaluation.plots import gates_of
from pipelines.experiments.statistics import Difference, compare
from pipelines.experiments.trial import Trial, folder_of, identity, read_trial, run_trial
from pipelines.features.files import atomic_write

if TYPE_CHECKING:
    from pipelines.datasets.base import RawData
    from pipelines.features.prepare import EncodedData

METRICS = ("auc", "logloss")
FAILED, COST = "failed.txt", "cost.json"
TELEMETRY = ("mean", "std", "saturation", "entropy")
SCORED_ROWS, REPEATS = 1000, 15


@dataclass(frozen=True)
class Cell:
    """One gate in one slot of a model.

    Args:
        slot: where the gate stands.
        gate: its name.
        control: name of the gate it is compared with.
        spec: the model with this gate, every slot written out.
    """

    slot: str
    gate: str
    control: str
    spec: ModelSpec

    @property
    def label(self) -> str:
        """The cell's name within its model."""
        return f"{self.slot}: {self.gate}"

    @property
    def is_control(self) -> bool:
        """Whether the slot's other gates are compared with this one."""
        return self.gate == self.control


def cells_of(spec: ModelSpec, slots: Collection[str] = (), gates: Collection[str] = ()) -> list[Cell]:
    """Return the cells of a model, slot by slot, the control first and then every registered gate that fits.

    A gate that the model has in a slot keeps its settings there; others have their defaults.

    Args:
        spec: the model and the gates that stand in the other slots.
        slots: only these; all of the model's own by default, which leaves out ``selection``.
        gates: only these, by name or dotted path, and the controls; all that are registered by default.

    Example:
        >>> [c.label for c in cells_of(ModelSpec(name="gdcn"), slots=["cross"])]
        ['cross: none', 'cross: recursive', 'cross: sigmoid']
    """
    own, cells = spec.all_gates, []
    for slot in MODELS[spec.name].default_gates:
        if slots and slot not in slots:
            continue
        control = own[slot].name if slot in WEIGHING else "none"
        fitting = [n for n in gates or GATES if slot in GATES[n].slots and n != control]
        for name in [control, *fitting] if fitting else []:
            gate = own[slot] if own[slot].name == name else GateSpec(name=name)
            whole = {s: g for s, g in sorted({**own, slot: gate}.items())}
            cells.append(Cell(slot, name, control, spec.model_copy(update={"gates": whole})))
    return cells


@dataclass(frozen=True)
class Study:
    """The part of the matrix that belongs to one model.

    Args:
        name: of the model.
        config: its settings and budget, the same for each cell.
        data: encoded rows.
        cells: by :func:`cells_of`.
        seeds: of the trainings of each cell.
        folder: keeps them.
    """

    name: str
    config: RunConfig
    data: EncodedData
    cells: tuple[Cell, ...]
    seeds: tuple[int, ...]
    folder: Path

    def config_of(self, cell: Cell, seed: int) -> RunConfig:
        """Return the configuration of one training."""
        return self.config.model_copy(update={"model": cell.spec, "seed": seed})

    @cached_property
    def jobs(self) -> list[Job]:
        """The different trainings: what several cells share stands once, under its first cell's name."""
        found: dict[str, Job] = {}
        for cell in self.cells:
            for seed in self.seeds:
                config = self.config_of(cell, seed)
                found.setdefault(identity(config, self.data), Job(self, cell, config))
        return list(found.values())

    def job(self, cell: Cell, seed: int) -> Job:
        """Return the training of a cell and seed."""
        return Job(self, cell, self.config_of(cell, seed))


@dataclass(frozen=True)
class Job:
    """One training of a study."""

    study: Study
    cell: Cell
    config: RunConfig

    def __str__(self) -> str:
        return f"{self.study.name}, {self.cell.label}, seed {self.config.seed}"

    @property
    def folder(self) -> Path:
        """Where its outcome lies."""
        return folder_of(self.config, self.study.data, self.study.folder)

    @property
    def error(self) -> str | None:
        """Why it failed when it was last tried; None if it did not."""
        file = self.folder / FAILED
        return file.read_text(encoding="utf-8") if file.is_file() else None

    def read(self) -> Trial | None:
        """Return its outcome; None if it is not finished."""
        return read_trial(self.folder)

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to be done, the cost included."""
        return (self.folder / COST).is_file() and self.read() is not None

    def run(self) -> Trial | None:
        """Train, or read back; measure the cost. A failure is kept for the report, and None returned."""
        failed = self.folder / FAILED
        try:
            trial = run_trial(self.config, self.study.data, self.study.folder, progress=False)
            if not (self.folder / COST).is_file():
                atomic_write(self.folder / COST, json.dumps(measure(self.config, self.study.data), indent=1))
        except Exception as error:  # a gate is anyone's code, and one that fails shall not end the matrix
            failed.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(failed, f"{type(error).__name__}: {error}")
            return None
        failed.unlink(missing_ok=True)
        return trial

    def cost(self) -> dict[str, Any]:
        """Return what :func:`measure` found."""
        return json.loads((self.folder / COST).read_text(encoding="utf-8"))


def dealt(jobs: Sequence[Job], part: int, parts: int) -> list[Job]:
    """Return the jobs of one of several processes that share a folder: each job falls to exactly one.

    Args:
        jobs: of the whole matrix, in the same order in each process.
        part: counted from 1.
        parts: number of processes.
    """
    return list(jobs[part - 1 :: parts])


def measure(config: RunConfig, data: EncodedData) -> dict[str, Any]:
    """Return what a model costs to score with, on one core, and which slot each of its gates stands in.

    ``flops_per_row`` is of a forward pass in evaluation, see :func:`ctr_models.gates.cost.operations`;
    ``milliseconds`` is the processor's time for 1,000 valid rows, in the quickest of some passes: what else the
    machine does only adds.
    """
    import torch

    from ctr_models.gates.cost import operations
    from pipelines.training.loader import Loader

    model = config.model.build(data.schema).eval()
    batches = iter(Loader(data.files("valid")[:1], data.schema, batch_size=SCORED_ROWS))
    batch = next(batches)
    batches.close()  # type: ignore[attr-defined]
    threads, times = torch.get_num_threads(), []
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            flops = operations(lambda: model(batch))
            for _ in range(REPEATS):
                begin = time.process_time()
                model(batch)
                times.append(time.process_time() - begin)
    finally:
        torch.set_num_threads(threads)
    return {
        "flops_per_row": flops / len(batch),
        "milliseconds": 1e6 * min(times) / len(batch),
        "slots": {path: gate.shape.slot for path, gate in model.named_modules() if isinstance(gate, Gate)},
    }


def telemetry_of(trial: Trial, slots: dict[str, str], slot: str) -> dict[str, dict[str, float]]:
    """Return what the gates of a slot told of the first valid rows, by path, with the weights that were kept."""
    return {path: figures for path, figures in gates_of(_best(trial)).items() if slots.get(path) == slot}


def _best(trial: Trial) -> dict[str, Any]:
    """Return the record of the epoch whose weights were kept."""
    return next(record for record in reversed(trial.history) if record["best"])


def records(study: Study) -> Iterator[dict[str, Any]]:
    """Yield one row for each cell and seed: its metrics, cost, and telemetry, or why there are none."""
    for cell in study.cells:
        for seed in study.seeds:
            job = study.job(cell, seed)
            row: dict[str, Any] = {
                "model": study.name,
                "data": study.data.path.name,
                "slot": cell.slot,
                "gate": cell.gate,
                "control": cell.control,
                "seed": seed,
                "status": "missing",
                "error": job.error,
            }
            if job.error is not None:
                row["status"] = "failed"
            elif job.is_done:
                trial = job.read()
                assert trial is not None
                row.update(status="trained", **_figures(trial, job.cost(), cell.slot))
            yield row


def _figures(trial: Trial, cost: dict[str, Any], slot: str) -> dict[str, Any]:
    told = telemetry_of(trial, cost["slots"], slot)
    means = {
        f"gate_{name}": float(np.mean(values))
        for name in TELEMETRY
        if (values := [figures[name] for figures in told.values() if name in figures])
    }
    test = {f"test_{name}": value for name, value in _tested(trial).items()}
    valid = {name: value for name, value in trial.metrics.items() if name.startswith("valid_")}
    return {
        **test,
        **valid,
        "best_epoch": _best(trial)["epoch"],
        "parameters": trial.parameters,
        "flops_per_row": cost["flops_per_row"],
        "rows_per_second": trial.rows_per_second,
        "milliseconds": cost["milliseconds"],
        **means,
        "telemetry": json.dumps(told),
    }


def _tested(trial: Trial) -> dict[str, float]:
    rows = trial.test
    return evaluate(*(rows[name].to_numpy() for name in ("label", "probability", "user")))


SCHEMA: dict[str, Any] = {
    **dict.fromkeys(("model", "data", "slot", "gate", "control"), pl.String),
    "seed": pl.Int64,
    **dict.fromkeys(("status", "error"), pl.String),
    **{f"{part}_{m}": pl.Float64 for part in ("test", "valid") for m in ("auc", "logloss", "gauc", "ne", "ece")},
    **dict.fromkeys(("best_epoch", "parameters"), pl.Int64),
    **dict.fromkeys(("flops_per_row", "rows_per_second", "milliseconds"), pl.Float64),
    **{f"gate_{name}": pl.Float64 for name in TELEMETRY},
    "telemetry": pl.String,
}
"""Columns of :func:`frame_of`. ``gate_*`` are means over the slot's gates; ``telemetry`` has each, as JSON."""


def frame_of(studies: Sequence[Study]) -> pl.DataFrame:
    """Return the :func:`records` of all studies."""
    return pl.DataFrame([row for study in studies for row in records(study)], schema=SCHEMA)


def differences(
    study: Study, *, metrics: Sequence[str] = METRICS, alpha: float = 0.05, resamples: int = 1000
) -> list[Difference]:
    """Compare each cell of which all seeds are trained with its control, paired on the same test rows.

    Holm's correction is over all cells of the study, for each metric: with chance 1 - alpha no verdict of the
    metric's column is wrong. Users are resampled as one; rows, where the data name no user.

    Args:
        study: of one model.
        metrics: of ``auc``, ``logloss``, ``gauc``.
        alpha: chance of any wrong verdict.
        resamples: of the bootstrap.

    Raises:
        DataError: two trainings were tested on different rows.
    """
    tests: dict[str, list[pl.DataFrame]] = {}
    for cell in study.cells:
        trials = [study.job(cell, seed).read() for seed in study.seeds]
        if all(trial is not None for trial in trials):
            tests[cell.label] = [trial.test for trial in trials if trial is not None]
    pairs = {c.label: f"{c.slot}: {c.control}" for c in study.cells if not c.is_control}
    pairs = {name: control for name, control in pairs.items() if name in tests and control in tests}
    if not pairs:
        return []
    first = next(iter(tests.values()))[0]
    same = first.select("row", "user", "label")
    for name, own in tests.items():
        if not all(test.select(same.columns).equals(same) for test in own):
            raise DataError(
                "its test rows are not those of the others",
                where=f"{study.folder}: {name}",
                remedy="delete the folder to train again",
            )
    user = first["user"].to_numpy()
    return compare(
        first["label"].to_numpy(),
        user if (user != user[0]).any() else np.arange(len(user)),
        {name: np.stack([test["probability"].to_numpy() for test in own]) for name, own in tests.items()},
        control=pairs,
        metrics=metrics,
        alpha=alpha,
        resamples=resamples,
    )


def summary(study: Study, frame: pl.DataFrame, found: Sequence[Difference]) -> pl.DataFrame:
    """Return one row for each cell: means over its seeds, what it costs beside its control, and the verdict.

    Speeds are the best of the seeds. ``chosen`` is the cell with the highest mean AUC on the valid rows, of those
    that are trained with all seeds: a choice among many is made where no result is read.

    Args:
        study: of one model.
        frame: of :func:`frame_of`.
        found: of :func:`differences`.
    """
    by_cell = {(d.challenger, d.metric): d for d in found}
    rows: list[dict[str, Any]] = []
    for cell in study.cells:
        own = frame.filter(model=study.name, slot=cell.slot, gate=cell.gate)
        trained = own.filter(status="trained")
        row: dict[str, Any] = {
            "model": study.name,
            "slot": cell.slot,
            "gate": cell.gate,
            "control": cell.control,
            "trained": len(trained),
            "seeds": len(study.seeds),
            "error": next(iter(own["error"].drop_nulls()), None),
            **{name: trained[name].mean() for name in MEANS},
            "test_auc_sd": trained["test_auc"].std() if len(trained) > 1 else None,
            "parameters": trained["parameters"].max(),
            "rows_per_second": trained["rows_per_second"].max(),
            "milliseconds": trained["milliseconds"].min(),
        }
        for metric in METRICS:
            d = by_cell.get((cell.label, metric))
            row |= {f"{metric}_{key}": getattr(d, key, None) for key in COMPARED}
        rows.append(row)
    whole = [row for row in rows if row["trained"] == row["seeds"]]
    chosen = max(whole, key=lambda row: row["valid_auc"], default=None)
    controls = {row["slot"]: row for row in rows if row["gate"] == row["control"]}
    for row in rows:
        row["chosen"] = row is chosen
        for name in COSTS:
            one, other = row[name], controls[row["slot"]][name]
            row[f"{name}_ratio"] = one / other if one is not None and other else None
    return pl.DataFrame(rows, infer_schema_length=None)


MEANS = (
    *("test_auc", "test_logloss", "test_gauc", "test_ece", "valid_auc", "best_epoch"),
    *("flops_per_row", *(f"gate_{name}" for name in TELEMETRY)),
)
COSTS = ("parameters", "flops_per_row", "rows_per_second", "milliseconds")
COMPARED = ("value", "low", "high", "p", "confidence", "verdict")


def some_users(raw: RawData, fraction: float, seed: int) -> RawData:
    """Keep all rows of a share of the users, drawn at random, in every part: histories stay whole.

    Raises:
        ConfigError: the source names no user.
    """
    if fraction == 1:
        return raw
    user = raw.spec.user if raw.spec is not None else None
    if user is None:
        raise ConfigError("the source names no user", where="--fraction", remedy="take all rows: --fraction 1")
    users = pl.concat([part.frame.select(user).unique() for part in raw.parts.values()]).collect()[user]
    users = users.unique().sort()
    drawn = np.random.default_rng(seed).permutation(len(users))[: max(1, round(fraction * len(users)))]
    kept = pl.col(user).is_in(users.gather(np.sort(drawn)).to_list())
    parts = {name: replace(part, frame=part.frame.filter(kept)) for name, part in raw.parts.items()}
    return replace(raw, parts=parts, fingerprint=f"{raw.fingerprint}, {fraction:g} of the users by seed {seed}")
