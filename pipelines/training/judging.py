"""What each phase of a recipe does to the valid rows: pruning costs calibration, and here it shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ctr_models.model import CTRModel

if TYPE_CHECKING:
    from pipelines.training.recipes import Context

VALID = "valid_"
SHOWN = ("auc", "logloss", "ece")


def judge_epoch(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the valid metrics of an epoch's record, by their plain names.

    Example:
        >>> judge_epoch({"epoch": 1, "valid_auc": 0.75, "valid_ece": 0.01})
        {'auc': 0.75, 'ece': 0.01}
    """
    return {name.removeprefix(VALID): value for name, value in record.items() if name.startswith(VALID)}


def judge_best(trained: Mapping[str, Any]) -> dict[str, float]:
    """Return the valid metrics of the best epoch of what :func:`pipelines.training.fit.fit` returns."""
    return judge_epoch(next(r for r in trained["history"] if r["epoch"] == trained["best_epoch"]))


def judge_model(context: Context, model: CTRModel) -> dict[str, float]:
    """Return a model's metrics on the valid rows of ``context.data``, equal on every rank.

    Args:
        context: of the phase.
        model: unsharded; rank 0 scores all rows.
    """
    from pipelines.training.predict import predict

    if context.me.first:
        size = context.config.train.eval_batch_size
        found = predict(model, context.data, "valid", batch_size=size).metrics()
    return context.me.share(found if context.me.first else None)


def judged_phases(outputs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return the report over all phases that judged a model; None if fewer than two did.

    Args:
        outputs: of the phases, by name; those with ``valid`` count.

    Returns:
        ``title``, ``rows`` and ``totals``; a metric that is not defined is an empty text.

    Example:
        >>> outputs = {"full": {"valid": {"auc": 0.75, "ece": 0.01}}, "retrain": {"valid": {"auc": 0.5}}}
        >>> judged_phases(outputs)["rows"][1]
        {'phase': 'retrain', 'auc': 0.5, 'logloss': '', 'ece': ''}
    """
    found = {phase: output["valid"] for phase, output in outputs.items() if "valid" in output}
    if len(found) < 2:
        return None
    return {
        "title": "valid rows after each phase",
        "rows": [{"phase": phase, **{name: own.get(name, "") for name in SHOWN}} for phase, own in found.items()],
        "totals": {
            f"phases/{phase}/{name}": own[name] for phase, own in found.items() for name in SHOWN if name in own
        },
    }
