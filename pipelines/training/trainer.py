"""Train a model from a configuration: the recipe, the best weights, the test rows read once, the record."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ctr_models.errors import ArtifactError
from ctr_models.model import CTRModel
from pipelines.config import RunConfig, dump_config
from pipelines.evaluation.ranking import Rankings
from pipelines.features.files import atomic_write
from pipelines.training.checkpoint import read_tensors, verify
from pipelines.training.distributed import Ranks, ranks
from pipelines.training.judging import judged_phases
from pipelines.training.predict import Predictions, predict
from pipelines.training.recipes import Context, make_recipe, run_recipe
from pipelines.training.slicing import check_slices, sliced
from pipelines.training.tracking import open_tracker

if TYPE_CHECKING:
    from pipelines.features.prepare import EncodedData

RESULT = "result.json"


@dataclass
class TrainResult:
    """What a run came to.

    Args:
        model: best weights, unsharded, on CPU, in evaluation mode.
        metrics: ``valid_*`` and ``test_*`` of auc, logloss, gauc, ne and ece, where they are defined; of a further
            task as ``test_auc_conversion``.
        history: one record an epoch, the first is epoch 1.
        run_dir: configuration, checkpoints and ``result.json``.
        rows_per_second: training rows over the time of the training steps, loader included.
        mlflow_run_id: None without tracking.
        data: the encoded features that the model reads; not those that were given where the recipe made others.
        first: whether this process is rank 0, the one that releases.
        slices: test metrics by column and value, for the columns of ``train.slices``.
        reports: what the recipe's phases have to tell, each a ``title``, ``rows`` and, some of them, ``totals``.
    """

    model: CTRModel
    metrics: dict[str, float]
    history: list[dict[str, Any]]
    run_dir: Path
    rows_per_second: float
    mlflow_run_id: str | None
    data: EncodedData
    first: bool = True
    slices: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    reports: list[dict[str, Any]] = field(default_factory=list)


def train(
    config: RunConfig, data: EncodedData, *, run_dir: Path, resume: bool = False, progress: bool = True
) -> TrainResult:
    """Train as ``config`` says and evaluate the best epoch's weights once on the test rows.

    Under torchrun every rank calls it with the same arguments; ``run_dir`` must be storage that all ranks see.

    Args:
        config: the run.
        data: encoded features.
        run_dir: gets the configuration, the checkpoints and the result.
        resume: go on from the newest whole checkpoint in ``run_dir``.
        progress: show progress on stderr.

    Returns:
        The result, equal on every rank.

    Raises:
        ConfigError: something that the configuration asks for can't be done.
        DataError: an encoded file can't be read.
    """
    run_dir = Path(run_dir)
    with ranks() as me, _threads(config.train.threads):
        settings = run_dir / "config.yaml"
        if me.first and not (resume and settings.is_file()):
            atomic_write(settings, dump_config(config))
        check_slices(data, config.train.slices)
        with open_tracker(config, data, run_dir, me, resume) as tracker:
            schema = data.schema
            context = Context(
                config,
                data,
                run_dir,
                me,
                config.model,
                schema,
                resume=resume,
                progress=progress,
                on_epoch=tracker.epoch,
            )
            recipe = make_recipe(config.recipe)
            context.judge = recipe.judge()
            context = run_recipe(recipe, context)
            if me.first:  # with what a resume may change; a refused one has left the file alone
                atomic_write(settings, dump_config(config))
            trained = next(o for o in reversed(context.outputs.values()) if "weights" in o)
            model = read_model(context, run_dir / trained["weights"])
            return _finish(context, data, trained, model, tracker, me)


def read_model(context: Context, weights: Path) -> CTRModel:
    """Build the context's model on CPU, unsharded, and read its weights from a checkpoint of any number of ranks.

    Raises:
        ArtifactError: the checkpoint is damaged or belongs to another model.
    """
    verify(weights)
    model = context.model.build(context.schema)
    read_tensors(weights, {f"model/{name}": tensor for name, tensor in model.state_dict().items()})
    return model.eval()


def _finish(
    context: Context, given: EncodedData, trained: dict[str, Any], model: CTRModel, tracker: Any, me: Ranks
) -> TrainResult:
    reports = [output["report"] for output in context.outputs.values() if "report" in output]
    phases = judged_phases(context.outputs)
    reports += [phases] if phases else []
    best = next(r for r in trained["history"] if r["epoch"] == trained["best_epoch"])
    metrics = {name: value for name, value in best.items() if name.startswith("valid_")}
    if me.first:
        test = judge_test(context.config, model, context.data)
        metrics.update({f"test_{name}": value for name, value in test.metrics().items()})
        # By the features as given: the rows are the same, and these still tell dropped values apart.
        slices = {} if isinstance(test, Rankings) else sliced(given, context.config.train.slices, test)
        result: dict[str, Any] = {
            "metrics": metrics,
            "slices": slices,
            "best_epoch": trained["best_epoch"],
            "rows_per_second": trained["rows_per_second"],
            "history": trained["history"],
            "reports": reports,
        }
        tracker.finish(result, test)
        result["mlflow_run_id"] = tracker.run_id
        atomic_write(context.run_dir / RESULT, json.dumps(result, indent=1))
    else:
        slices = {}
    metrics, slices, run_id = me.share((metrics, slices, tracker.run_id))
    rate = trained["rows_per_second"]
    return TrainResult(
        model,
        metrics,
        trained["history"],
        context.run_dir,
        rate,
        run_id,
        context.data,
        first=me.first,
        slices=slices,
        reports=reports,
    )


def judge_test(config: RunConfig, model: CTRModel, data: EncodedData) -> Predictions | Rankings:
    """Return what the recipe's judge, or the probabilities, say of the test rows.

    Args:
        config: of the run that trained the model.
        model: unsharded.
        data: encoded with the model's features.
    """
    own, size = make_recipe(config.recipe).judge(), config.train.eval_batch_size
    return predict(model, data, "test", batch_size=size) if own is None else own(model, data, "test", size)


def read_result(run_dir: Path) -> dict[str, Any]:
    """Return what ``result.json`` of a finished run holds.

    Raises:
        ArtifactError: the run is not finished.
    """
    try:
        return json.loads((run_dir / RESULT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ArtifactError(
            "no finished run stands here", where=str(run_dir), remedy="finish it with sluice train --resume"
        ) from None


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
