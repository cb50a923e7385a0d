"""``sluice bench next-item``: MQSA-TED against SASRec, the next movie of MovieLens-1M among all movies.

Settings are data: ``pipelines/training/published/movielens_1m_next_item/<model>.yaml``, of one budget. The epoch is
chosen by NDCG@10 on the valid rows. A finished (model, seed) is kept under the work directory and read back, and a
training that broke off goes on from its last epoch.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipelines.benchmarks.report import AtLeast, AtMost, BenchReport, JsonPath
from pipelines.wording import counted

if TYPE_CHECKING:
    import numpy as np

    from pipelines.experiments.trial import Trial

DATASET = "movielens_1m_next_item"
CONTROL, CHALLENGER = "sasrec", "mqsa_ted"
METRICS = tuple(f"{name}_{cut}" for name in ("hr", "ndcg") for cut in (5, 10, 20))


def main(
    data: Annotated[Path, typer.Option(help="Folder of MovieLens-1M, or one that holds movielens_1m/.")],
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each model.")] = 3,
    workdir: Annotated[Path, typer.Option(help="Encoded features and finished trainings.")] = Path(
        "runs/next-item"
    ),
    json_path: JsonPath = None,
    at_least: AtLeast = None,
    at_most: AtMost = None,
) -> None:
    """Train both models on each seed and compare HR and NDCG on the same users, by full ranking.

    Example: sluice bench next-item --data data/movielens_1m --seeds 3 --at-least ndcg_10_sasrec=0.1
    """
    from rich.console import Console

    from pipelines.benchmarks.accuracy_bench import settings
    from pipelines.datasets.base import open_data
    from pipelines.experiments.trial import run_trial
    from pipelines.features.prepare import prepare

    talk = Console(stderr=True)
    trials: dict[str, list[Trial]] = {}
    for model in (CONTROL, CHALLENGER):
        config = settings(f"{DATASET}/{model}", data, workdir)
        encoded = prepare(open_data(config.data), config.features, workdir=workdir, seed=config.seed)
        trials[model] = []
        for seed in range(config.seed, config.seed + seeds):
            trial = run_trial(config.model_copy(update={"seed": seed}), encoded, workdir / DATASET / model)
            told = ", ".join(
                f"{split} NDCG@10 {trial.metrics[f'{split}_ndcg_10']:.5f}" for split in ("valid", "test")
            )
            talk.print(f"{model}, seed {seed}: {told}", style="dim", highlight=False)
            trials[model].append(trial)
    report(trials, seeds).finish(json_path, at_least, at_most)


def report(trials: dict[str, list[Trial]], seeds: int) -> BenchReport:
    """Return the table of both models, and of their difference on the same users.

    Args:
        trials: by model, one a seed, the same seeds for both.
        seeds: how many.
    """
    import numpy as np

    from pipelines.experiments.statistics import compare_means

    found = BenchReport(
        f"next movie of MovieLens-1M, {counted(seeds, 'seed')}",
        ["metric", CONTROL, "sd", CHALLENGER, "sd", "difference", "95 % interval", "verdict"],
    )
    values = {model: [_values(trial) for trial in own] for model, own in trials.items()}
    users = trials[CONTROL][0].test["user"].to_numpy()
    for metric in METRICS:
        arms = {model: np.stack([one[metric] for one in own]) for model, own in values.items()}  # (S, N)
        (gain,) = compare_means(arms, users, control=CONTROL, metric=metric)
        cells: list[object] = []
        for model in (CONTROL, CHALLENGER):
            means = arms[model].mean(1)
            deviation = float(means.std(ddof=1)) if seeds > 1 else 0.0
            cells += [f"{means.mean():.5f}", f"{deviation:.5f}"]
            found.figures |= {f"{metric}_{model}": float(means.mean()), f"{metric}_{model}_sd": deviation}
        found.row(
            metric.upper().replace("_", "@"),
            *cells,
            f"{gain.value:+.5f}",
            f"{gain.low:+.5f} to {gain.high:+.5f}",
            gain.verdict,
        )
        found.figures |= {
            f"{metric}_difference": gain.value,
            f"{metric}_low": gain.low,
            f"{metric}_high": gain.high,
        }
    for model, own in trials.items():
        epochs = [max(t.history, key=lambda record: record["valid_ndcg_10"])["epoch"] for t in own]
        minutes = [sum(_seconds(record, t) for record in t.history) / 60 for t in own]
        found.figures |= {
            f"parameters_{model}": float(own[0].parameters),
            f"epochs_{model}": float(np.mean([len(t.history) for t in own])),
            f"minutes_{model}": float(np.mean(minutes)),
        }
        found.note(
            f"{model}: best epoch {', '.join(map(str, epochs))} of {', '.join(str(len(t.history)) for t in own)}; "
            f"{own[0].parameters:,} parameters; {np.mean(minutes):.1f} minutes a training"
        )
    found.note(
        f"{len(users):,} users, ranked among all movies outside their whole history; epoch chosen by NDCG@10 "
        "on valid; test read once; interval over users, paired, and seeds"
    )
    return found


def _values(trial: Trial) -> dict[str, np.ndarray]:
    from pipelines.evaluation.ranking import ranking_values

    return ranking_values(trial.test["rank"].to_numpy())


def _seconds(record: dict[str, float], trial: Trial) -> float:
    """Time of one epoch: its rows at the training's speed, and its evaluation."""
    return record["evaluation_seconds"] + len(trial.test) / record["rows_per_second"]
