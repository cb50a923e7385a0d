"""One training whose outcome is kept: trained once, then read back as long as nothing that decides it changes."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from ctr_models.errors import ArtifactError
from pipelines.config import RunConfig
from pipelines.experiments.experiment import digest
from pipelines.features.files import atomic_directory, sha256_file

if TYPE_CHECKING:
    from pipelines.features.prepare import EncodedData
    from pipelines.training.predict import Predictions

RESULT, PREDICTIONS = "result.json", "test.parquet"


@dataclass(frozen=True)
class Trial:
    """The outcome of one configuration with its seed.

    Args:
        test: predictions of the test rows: ``row``, ``user``, ``label``, ``probability``, and, of each further task
            that the model predicts, ``label_<task>`` and ``probability_<task>``, null where its label is unknown.
        metrics: ``valid_*``, by which the epoch was chosen, and ``test_*``.
        history: one record an epoch.
        rows_per_second: training speed.
        parameters: trained numbers.
        totals: of the recipe's reports, by name.
        fresh: whether it was trained now, not read back.
    """

    test: pl.DataFrame
    metrics: dict[str, float]
    history: list[dict[str, Any]]
    rows_per_second: float
    parameters: int
    totals: dict[str, float]
    fresh: bool


def run_trial(config: RunConfig, data: EncodedData, folder: Path, *, progress: bool = True) -> Trial:
    """Train a configuration, or read back what training it came to.

    The test predictions are Parquet under ``<folder>/seed-<seed>-<hash of all that decides them>/finished``, a
    folder that is whole or absent. A training that broke off goes on from its newest checkpoint beside it.

    Args:
        config: with the seed of this trial.
        data: encoded rows.
        folder: of this arm or model.
        progress: show training progress on stderr.

    Raises:
        ArtifactError: the predictions kept are damaged.
    """
    own = folder_of(config, data, folder)
    trial = read_trial(own)
    if trial is not None:
        return trial
    _train(config, data, own, progress)
    trained = read_trial(own)
    assert trained is not None
    return replace(trained, fresh=True)


def folder_of(config: RunConfig, data: EncodedData, folder: Path) -> Path:
    """Return where :func:`run_trial` keeps a trial."""
    return Path(folder) / f"seed-{config.seed}-{identity(config, data)}"


def read_trial(own: Path) -> Trial | None:
    """Read a finished trial back; None if there is none.

    Args:
        own: by :func:`folder_of`.

    Raises:
        ArtifactError: the predictions kept are damaged.
    """
    finished = own / "finished"
    if not (finished / RESULT).exists():
        return None
    result = json.loads((finished / RESULT).read_text(encoding="utf-8"))
    if sha256_file(finished / PREDICTIONS) != result["sha256"]:
        raise ArtifactError(
            "the predictions are not those that were written",
            where=str(finished / PREDICTIONS),
            remedy=f"delete {own} to train again",
        )
    return Trial(
        pl.read_parquet(finished / PREDICTIONS),
        result["metrics"],
        result["history"],
        result["rows_per_second"],
        result["parameters"],
        result.get("totals", {}),
        fresh=False,
    )


def identity(config: RunConfig, data: EncodedData) -> str:
    """Return twelve hex digits over all that decides a training's outcome: rows, model, recipe, settings, seed."""
    content = json.loads(config.model_dump_json(include={"model", "recipe", "train", "seed"}))
    return digest({**content, "rows": data.path.name})


def _train(config: RunConfig, data: EncodedData, own: Path, progress: bool) -> None:
    from pipelines.evaluation.ranking import Rankings
    from pipelines.training.trainer import judge_test, train

    run_dir = own / "training"
    trained = train(config, data, run_dir=run_dir, resume=run_dir.exists(), progress=progress)
    test = judge_test(config, trained.model, trained.data)
    frame = pl.DataFrame(test.columns()) if isinstance(test, Rankings) else _rows(test)
    with atomic_directory(own / "finished") as aside:
        frame.write_parquet(aside / PREDICTIONS)
        result = {
            "metrics": trained.metrics,
            "history": trained.history,
            "rows_per_second": trained.rows_per_second,
            "parameters": sum(p.numel() for p in trained.model.parameters()),
            "totals": {k: v for report in trained.reports for k, v in report.get("totals", {}).items()},
            "sha256": sha256_file(aside / PREDICTIONS),
        }
        (aside / RESULT).write_text(json.dumps(result, indent=1), encoding="utf-8")


def _rows(test: Predictions) -> pl.DataFrame:
    columns = {"row": test.row, "user": test.user, "label": test.label, "probability": test.probability}
    frame = pl.DataFrame(columns)
    for task, found in test.tasks.items():
        of_task = {"row": found.row, f"label_{task}": found.label, f"probability_{task}": found.probability}
        frame = frame.join(pl.DataFrame(of_task), on="row", how="left", maintain_order="left")
    return frame
