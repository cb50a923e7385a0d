"""The best that any model can do, where the true click probability is known."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import polars as pl

from pipelines.features.spec import LABEL, task_label
from pipelines.features.transform import ROW, USER
from pipelines.training.predict import Predictions

if TYPE_CHECKING:
    from pipelines.features.prepare import EncodedData


def best_possible(data: EncodedData, split: str) -> dict[str, float]:
    """Return the metrics of the true probabilities themselves; empty where they are not known.

    Args:
        data: encoded features; ``data.truth`` names the column, ``data.task_truth`` those of further tasks.
        split: ``train``, ``valid`` or ``test``.

    Returns:
        As :meth:`Predictions.metrics` names them.
    """
    if data.truth is None:
        return {}
    tasks = {task: _of(data, split, task_label(task), column) for task, column in data.task_truth.items()}
    return replace(_of(data, split, LABEL, data.truth), tasks=tasks).metrics()


def _of(data: EncodedData, split: str, label: str, truth: str) -> Predictions:
    """The true probabilities as if they were predicted, of the rows whose label is known."""
    frame = data.frame(split).select(label, USER, ROW, truth).filter(pl.col(label).is_not_nan()).collect()
    y, user, row, p = (frame[name].to_numpy() for name in (label, USER, ROW, truth))
    return Predictions(y, p.astype(float), user, row)
