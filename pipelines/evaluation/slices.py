"""Metrics by the values of a column: where a model is good, and where it is not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ctr_models.errors import DataError
from pipelines.evaluation.metrics import ece, evaluate, logloss


@dataclass(frozen=True)
class Slice:
    """One value of a column.

    Args:
        value: as it stands in the column; None for missing.
        rows: how many have it.
        clicks: how many of these have label 1.
        metrics: as :func:`pipelines.evaluation.metrics.evaluate`; only ``logloss`` and ``ece`` where all labels
            are equal, since the others have no meaning there.
    """

    value: Any
    rows: int
    clicks: int
    metrics: dict[str, float]


def slice_metrics(
    values: npt.ArrayLike,
    label: npt.ArrayLike,
    p: npt.ArrayLike,
    group: npt.ArrayLike | None = None,
    *,
    minimum: int = 100,
    limit: int = 50,
) -> list[Slice]:
    """Evaluate the rows of each value of a column.

    Args:
        values: the column, (N,); None and NaN are one value.
        label: 0 or 1, (N,).
        p: probabilities, (N,).
        group: the user of each row, (N,), for ``gauc``.
        minimum: values with fewer rows are left out: their metrics would be chance.
        limit: at most so many values, those with the most rows.

    Returns:
        Slices by falling number of rows.

    Raises:
        DataError: lengths differ, and as the metrics.

    Example:
        >>> city = ["Rome"] * 4 + ["Oslo"] * 2
        >>> [(s.value, s.rows, s.metrics["auc"]) for s in slice_metrics(
        ...     city, [0, 1, 0, 1, 0, 1], [0.2, 0.8, 0.3, 0.4, 0.7, 0.1], minimum=2)]
        [('Rome', 4, 1.0), ('Oslo', 2, 0.0)]
    """
    column = np.asarray(values, dtype=object)
    y, q = np.asarray(label), np.asarray(p)
    if column.shape != y.shape:
        raise DataError(f"{column.shape} values for {y.shape} rows", where="slices", remedy="give one value a row")
    logloss(y, q)  # bad rows are named by their number in the whole, not in a slice
    codes: dict[Any, int] = {}
    code = np.array([codes.setdefault(None if v is None or v != v else v, len(codes)) for v in column.tolist()])
    order = np.argsort(code, kind="stable")
    sizes = np.bincount(code, minlength=len(codes))
    ends = np.cumsum(sizes)
    names = list(codes)
    found = []
    for index in np.argsort(-sizes, kind="stable")[:limit]:
        if sizes[index] < minimum:
            break
        rows = order[ends[index] - sizes[index] : ends[index]]
        clicks = int((y[rows] == 1).sum())
        if 0 < clicks < len(rows):
            metrics = evaluate(y[rows], q[rows], None if group is None else np.asarray(group)[rows])
        else:
            metrics = {"logloss": logloss(y[rows], q[rows]), "ece": ece(y[rows], q[rows])}
        found.append(Slice(names[index], len(rows), clicks, metrics))
    return found
