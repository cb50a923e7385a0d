"""``sluice bench tasks``: click and conversion learnt together, held against a model for each.

The log is a click world with conversions, so that the best possible is known. A finished training is kept under the
work directory and read back, so that a run that broke off goes on.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipelines.benchmarks.report import AtLeast, AtMost, BenchReport, JsonPath
from pipelines.wording import counted

if TYPE_CHECKING:
    import polars as pl

    from pipelines.config import RunConfig
    from pipelines.experiments.statistics import Difference
    from pipelines.experiments.trial import Trial
    from pipelines.features.prepare import EncodedData

MODEL: dict[str, Any] = {
    "name": "mmoe",
    "embedding_std": 0.01,
    "experts": 4,
    "expert": {"hidden": [32, 16], "dropout": 0.1},
    "tower": {"hidden": [8]},
}
TRAIN: dict[str, Any] = {
    "batch_size": 512,
    "optimizer": {"lr": 3e-3},
    "embedding": {"backend": "dense", "l2": 1e-3},
    "plateau": None,
    "stopping": None,
    "threads": 1,
}
WEIGHT = 0.2
"""Of the conversion's loss: a fifth of the rows are clicks, so that a known row counts alike for both tasks."""
CONTROL, ARM = "one model each", "mmoe"


def main(
    rows: Annotated[int, typer.Option(min=2000, help="Impressions of the click world.")] = 60_000,
    rate: Annotated[float, typer.Option(min=0.01, max=0.99, help="Conversions a click.")] = 0.2,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each arm.")] = 3,
    epochs: Annotated[int, typer.Option(min=1, help="Of each training; the best is kept.")] = 10,
    workdir: Annotated[Path, typer.Option(help="World, features and finished trainings.")] = Path("runs/tasks"),
    json_path: JsonPath = None,
    at_least: AtLeast = None,
    at_most: AtMost = None,
) -> None:
    """Train click and conversion together and apart, and compare both tasks on the same test rows.

    Example: sluice bench tasks --seeds 3 --at-least auc_conversion_mmoe=0.6
    """
    import numpy as np
    from rich.console import Console

    from pipelines.evaluation.metrics import evaluate
    from pipelines.experiments.statistics import compare
    from pipelines.experiments.trial import run_trial
    from pipelines.training.truth import best_possible

    data = encoded(rows, rate, workdir)
    apart = {"click": data["click"], "conversion": data["conversion"]}
    talk = Console(stderr=True)
    found: dict[str, dict[str, list[tuple[Trial, pl.DataFrame]]]] = {"click": {}, "conversion": {}}
    for seed in range(1, seeds + 1):
        for arm, options in ((CONTROL, {}), (ARM, {"task_weights": {"conversion": WEIGHT}})):
            config = _config(options, epochs, seed, workdir)
            for task, own in apart.items() if arm == CONTROL else [("", data["both"])]:
                trial = run_trial(config, own, workdir / arm.replace(" ", "-") / task)
                for name in [task] if task else apart:
                    found[name].setdefault(arm, []).append((trial, predictions(trial, "" if task else name)))
                what = f"{arm} {task}".strip()
                talk.print(f"{what}, seed {seed}: epoch {_epoch(trial)} was best", style="dim", highlight=False)
    report = BenchReport(
        f"click and conversion, {counted(seeds, 'seed')}",
        ["task", "arm", "test AUC", "sd", "difference (95 %)", "logloss", "difference (95 %)", "best epochs"],
    )
    for task, arms in found.items():
        truth = best_possible(apart[task], "test")
        report.row(task, "best possible", f"{truth['auc']:.5f}", "", "", f"{truth['logloss']:.5f}", "", "")
        report.figures |= {f"best_{name}_{task}": truth[name] for name in ("auc", "logloss")}
        rows_of = next(iter(arms.values()))[0][1]
        label, user = rows_of["label"].to_numpy(), rows_of["user"].to_numpy()
        arrays = {arm: np.stack([p["probability"].to_numpy() for _, p in one]) for arm, one in arms.items()}
        differences = {(d.challenger, d.metric): d for d in compare(label, user, arrays, control=CONTROL)}
        for arm, one in arms.items():
            found_of = [evaluate(label, p) for p in arrays[arm]]
            auc, loss = (np.array([f[name] for f in found_of]) for name in ("auc", "logloss"))
            deviation = float(auc.std(ddof=1)) if seeds > 1 else 0.0
            less = [differences.get((arm, name)) for name in ("auc", "logloss")]
            report.row(
                task,
                arm,
                f"{auc.mean():.5f}",
                f"{deviation:.5f}",
                _shown(less[0]),
                f"{loss.mean():.5f}",
                _shown(less[1]),
                ", ".join(str(_epoch(trial)) for trial, _ in one),
            )
            key = f"{task}_{arm.replace(' ', '_')}"
            report.figures |= {f"auc_{key}": float(auc.mean()), f"logloss_{key}": float(loss.mean())}
            for d in less:
                if d is not None:
                    ends = {"difference": d.value, "low": d.low, "high": d.high}
                    report.figures |= {f"{d.metric}_{key}_{end}": value for end, value in ends.items()}
    report.note(f"differences from {CONTROL}; intervals resample users")
    report.note("epoch by valid AUC: of the click where both are learnt together, of each where apart")
    report.finish(json_path, at_least, at_most)


def encoded(rows: int, rate: float, workdir: Path) -> dict[str, EncodedData]:
    """Make the world and encode it for both tasks, for the click, and for the conversion alone.

    The rows are split by time once; the last has only those with a click, and their histories are the same.
    """
    import polars as pl

    from pipelines.datasets.base import RawData, RawPart, open_data
    from pipelines.datasets.config import DataConfig, SplitConfig
    from pipelines.features.prepare import prepare
    from pipelines.features.spec import FeatureSpec

    options = {"rows": rows, "users": 500, "items": 200, "conversion_rate": rate}
    raw = open_data(DataConfig(source="click_world", options=options, path=workdir / f"world-{rows}-{rate}"))
    assert raw.spec is not None
    frame = raw.parts["all"].frame.collect()
    third = pl.int_range(pl.len()) / pl.len()
    split = (
        pl.when(third < 0.7)
        .then(pl.lit("train"))
        .when(third < 0.85)
        .then(pl.lit("valid"))
        .otherwise(pl.lit("test"))
    )
    frame = frame.with_columns(split=split)
    clicked = frame.filter(pl.col("click") == 1)
    task = raw.spec.tasks[0]
    truth = raw.task_truth[task]
    tree = raw.spec.model_dump(mode="json")
    for column in tree["columns"]:
        if column["from_log"] is not None:
            column["from_log"]["rows"] = "all"  # every row is a click
    of_task = FeatureSpec.model_validate({**tree, "label": task, "tasks": [], "keep": [truth]})
    path = raw.parts["all"].path

    def made(frame: pl.DataFrame, spec: FeatureSpec, truth: str | None, what: str) -> EncodedData:
        part = {"all": RawPart(frame.lazy(), path)}
        own = RawData(part, SplitConfig(by="column", column="split"), spec, f"{raw.fingerprint} {what}", truth)
        return prepare(own, None, workdir=workdir, seed=1)

    return {
        "both": made(frame, raw.spec, raw.truth, "both"),
        "click": made(frame, raw.spec.model_copy(update={"tasks": ()}), raw.truth, "click"),
        "conversion": made(clicked, of_task, truth, "conversion"),
    }


def predictions(trial: Trial, task: str) -> pl.DataFrame:
    """Return ``user``, ``label`` and ``probability`` of the test rows in which the task's label is known.

    Args:
        trial: of a model.
        task: ``click`` or empty: what the model serves; else one of its further tasks.
    """
    import polars as pl

    if task in ("", "click"):
        return trial.test.select("user", "label", "probability")
    known = trial.test.filter(pl.col(f"label_{task}").is_not_null())
    return known.select("user", label=f"label_{task}", probability=f"probability_{task}")


def _config(options: dict[str, Any], epochs: int, seed: int, workdir: Path) -> RunConfig:
    from pipelines.config import parse_config

    return parse_config(
        {
            "workdir": str(workdir),
            "seed": seed,
            "model": {**MODEL, **options},
            "train": {**TRAIN, "epochs": epochs},
            "tracking": {"enabled": False},
        }
    )


def _epoch(trial: Trial) -> int:
    return max(trial.history, key=lambda record: record["valid_auc"])["epoch"]


def _shown(d: Difference | None) -> str:
    return "" if d is None else f"{d.value:+.5f} ({d.low:+.5f} to {d.high:+.5f})"
