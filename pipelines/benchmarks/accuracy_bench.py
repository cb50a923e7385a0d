"""``sluice bench accuracy``: published settings on published data, several seeds, the test rows read once.

Settings are data: ``pipelines/training/published/<data set>/<model>.yaml``. The epoch is chosen on the valid rows.
A finished (model, seed) is kept under the work directory and read back, so a run that broke off goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ctr_models.errors import ConfigError, DataError, nearest
from pipelines.benchmarks.report import AtLeast, AtMost, BenchReport, JsonPath
from pipelines.wording import counted

if TYPE_CHECKING:
    import polars as pl

    from pipelines.config import RunConfig
    from pipelines.features.prepare import EncodedData

PUBLISHED = Path(str(files("pipelines.training"))) / "published"


def main(
    data: Annotated[
        Path, typer.Option(help="Folder of Frappe_x1 or MovieLens-1M, or one that holds frappe/ and movielens_1m/.")
    ],
    dataset: Annotated[
        str, typer.Option(help="frappe_x1, movielens_1m (both told from the files) or movielens_1m_history.")
    ] = "",
    models: Annotated[str, typer.Option(help="Comma-separated; all that have published settings.")] = "",
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each model.")] = 3,
    control: Annotated[str, typer.Option(help="Compare the other models with this one, with intervals.")] = "",
    within: Annotated[
        list[str] | None,
        typer.Option(help="column=value, repeatable: compare on those test rows too, of a column that is kept."),
    ] = None,
    workdir: Annotated[Path, typer.Option(help="Encoded features and finished trainings.")] = Path("runs/accuracy"),
    json_path: JsonPath = None,
    at_least: AtLeast = None,
    at_most: AtMost = None,
) -> None:
    """Train models by their published settings and hold their test AUC against bars.

    Example: sluice bench accuracy --data data/frappe --control dcnv2 --at-least auc_finalmlp=0.985
    """
    import numpy as np
    from rich.console import Console

    from pipelines.datasets.base import open_data
    from pipelines.evaluation.metrics import evaluate
    from pipelines.experiments.trial import run_trial
    from pipelines.features.prepare import prepare

    name = dataset or _told_from(data)
    known = sorted(p.stem for p in (PUBLISHED / name).glob("*.yaml"))
    if not known:
        folders = [p.name for p in PUBLISHED.iterdir() if p.is_dir()]
        raise ConfigError(f"no published settings for {name!r}", where="--dataset", remedy=nearest(name, folders))
    wanted = [m.strip() for m in models.split(",") if m.strip()] or known
    for model in wanted:
        if model not in known:
            raise ConfigError(
                f"no published settings for {model!r}", where="--models", remedy=nearest(model, known)
            )
    if control and control not in wanted:
        raise ConfigError(
            f"{control!r} is not among the models", where="--control", remedy=nearest(control, wanted)
        )
    if within and not control:
        raise ConfigError("--within needs a --control", where="--within", remedy=f"add --control {wanted[0]}")
    talk = Console(stderr=True)
    report = BenchReport(
        f"{name}, {counted(seeds, 'seed')}",
        ["model", "test AUC", "sd", "min", "max", "logloss", "valid AUC", "best epoch", "parameters", "rows/s"],
    )
    finished: dict[str, list[pl.DataFrame]] = {}
    for model in wanted:
        config = settings(f"{name}/{model}", data, workdir)
        encoded = prepare(open_data(config.data), config.features, workdir=workdir, seed=config.seed)
        trials, tests = [], []
        for seed in range(config.seed, config.seed + seeds):
            one = config.model_copy(update={"seed": seed})
            trial = run_trial(one, encoded, workdir / name / model)
            rows = trial.test
            found = evaluate(rows["label"].to_numpy(), rows["probability"].to_numpy())
            talk.print(
                f"{model}, seed {seed}: valid AUC {trial.metrics['valid_auc']:.5f}, test AUC {found['auc']:.5f}",
                style="dim",
                highlight=False,
            )
            trials.append(trial)
            tests.append(found)
        finished[model] = [trial.test for trial in trials]
        auc = np.array([t["auc"] for t in tests])
        deviation = float(auc.std(ddof=1)) if seeds > 1 else 0.0
        loss = float(np.mean([t["logloss"] for t in tests]))
        valid = float(np.mean([t.metrics["valid_auc"] for t in trials]))
        best = [max(t.history, key=lambda record: record.get("valid_auc", 0.0))["epoch"] for t in trials]
        speed = float(np.mean([t.rows_per_second for t in trials]))
        report.row(
            model,
            *(f"{x:.5f}" for x in (auc.mean(), deviation, auc.min(), auc.max(), loss, valid)),
            ", ".join(map(str, best)),
            trials[0].parameters,
            speed,
        )
        report.figures |= {
            f"auc_{model}": float(auc.mean()),
            f"auc_{model}_sd": deviation,
            f"auc_{model}_min": float(auc.min()),
            f"auc_{model}_max": float(auc.max()),
            f"logloss_{model}": loss,
            f"valid_auc_{model}": valid,
            f"parameters_{model}": float(trials[0].parameters),
            f"rows_per_second_{model}": speed,
        }
        for key in trials[0].totals:
            mean = float(np.mean([t.totals[key] for t in trials]))
            report.figures[f"{key.replace('/', '_')}_{model}"] = mean
            report.note(f"{model}: {key} {mean:.5g}, mean of the seeds")
    report.note("epoch chosen on the valid rows; test rows read once, with that epoch's weights")
    if control:
        _compare(report, finished, control, encoded, within or [])
    report.finish(json_path, at_least, at_most)


def _compare(
    report: BenchReport,
    finished: dict[str, list[pl.DataFrame]],
    control: str,
    data: EncodedData,
    within: Sequence[str],
) -> None:
    """Add each model's difference to the control, on all test rows and on those of each ``column=value``."""
    import numpy as np
    import polars as pl

    from pipelines.experiments.statistics import compare

    first = finished[control][0]
    for name, tests in finished.items():
        if not all(test["row"].equals(first["row"]) for test in tests):
            raise DataError(
                "its test rows are not those of the control",
                where=name,
                remedy="compare models whose settings name the same data",
            )
    groups = {"": np.ones(len(first), dtype=bool)}
    for text in within:
        column, sign, value = text.partition("=")
        if not sign or column not in data.state.spec.keep:
            raise ConfigError(
                f"{text!r} is not column=value of a column that the features keep",
                where="--within",
                remedy=nearest(column, list(data.state.spec.keep)),
            )
        kept = data.frame("test").select("__row__", column).collect()
        rows = kept.filter(pl.col(column).cast(pl.String) == value)["__row__"]
        groups[f"_{column}_{value}"] = first["row"].is_in(rows.implode()).to_numpy()
    user = first["user"].to_numpy()
    cluster = user if (user != user[0]).any() else np.arange(len(user))
    for key, chosen in groups.items():
        predictions = {n: np.stack([t["probability"].to_numpy()[chosen] for t in ts]) for n, ts in finished.items()}
        for d in compare(
            first["label"].to_numpy()[chosen], cluster[chosen], predictions, control=control, metrics=("auc",)
        ):
            for end, figure in (("", d.value), ("_low", d.low), ("_high", d.high)):
                report.figures[f"gain_{d.challenger}{key}{end}"] = figure
            where = f" where {key[1:].rpartition('_')[0]} is {key.rpartition('_')[2]}" if key else ""
            report.note(
                f"{d.challenger} against {control}{where}: {d.value:+.5f} ({d.low:+.5f} to {d.high:+.5f}), "
                f"{d.verdict}; {d.clusters:,} users, {d.rows:,} rows"
            )
    report.note("differences of test AUC with 95 % intervals over users and seeds, Holm over the models")


def _told_from(data: Path) -> str:
    if any((data / f"ratings.{kind}").exists() for kind in ("parquet", "dat")):
        return "movielens_1m"
    if any((data / f"train.{kind}").exists() for kind in ("parquet", "csv")):
        return "frappe_x1"
    raise DataError(
        "neither Frappe_x1 (train, valid, test) nor MovieLens-1M (ratings, users, movies) is here",
        where=str(data),
        remedy="name the folder, and the data set with --dataset where one folder holds several",
    )


def settings(name: str, data: Path, workdir: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Return published settings, with the data where they lie and no record in MLflow.

    Args:
        name: ``<data set>/<model>``.
        data: folder of the data set, or one that holds it under its source's name.
        workdir: of the run.
        overrides: ``key.sub=value``.
    """
    from pipelines.config import load_config

    config = load_config(PUBLISHED / f"{name}.yaml", overrides)
    own = data / config.data.source
    return config.model_copy(
        update={
            "workdir": workdir,
            "data": config.data.model_copy(update={"path": own if own.is_dir() else data}),
            "tracking": config.tracking.model_copy(update={"enabled": False}),
        }
    )
