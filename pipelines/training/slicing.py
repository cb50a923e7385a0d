"""Test metrics by the values of chosen columns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import polars as pl

from ctr_models.errors import ConfigError, nearest
from pipelines.evaluation.slices import slice_metrics
from pipelines.features.spec import Vocabulary

if TYPE_CHECKING:
    from pipelines.features.prepare import EncodedData
    from pipelines.training.predict import Predictions

UNSEEN = "(not in the vocabulary)"


def check_slices(data: EncodedData, columns: tuple[str, ...]) -> None:
    """Refuse columns that can't be sliced by, before any training.

    Raises:
        ConfigError: naming the column and the nearest that will do.
    """
    if not columns:
        return
    spec = data.state.spec
    known = [*(c.name for c in spec.direct if c.id_kind == "categorical"), *spec.keep]
    for column in columns:
        if column not in known:
            raise ConfigError(
                f"{column!r} is no categorical or kept column", where="train.slices", remedy=nearest(column, known)
            )


def sliced(data: EncodedData, columns: tuple[str, ...], found: Predictions) -> dict[str, list[dict[str, Any]]]:
    """Evaluate predictions of the test rows by the values of each column.

    Args:
        data: encoded features.
        columns: checked by :func:`check_slices`.
        found: predictions of all test rows, in their order.

    Returns:
        For each column its most frequent values: ``value`` as it stands in the log (None for missing; the id of a
        hashed or bucketed column), ``rows``, ``clicks`` and metrics.
    """
    report = {}
    for column in columns:
        values = data.frame("test").select(column).collect()[column]
        slices = slice_metrics(_as_logged(data, column, values), found.label, found.probability, found.user)
        report[column] = [{"value": s.value, "rows": s.rows, "clicks": s.clicks, **s.metrics} for s in slices]
    return report


def _as_logged(data: EncodedData, column: str, values: pl.Series) -> Any:
    own = next((c for c in data.state.spec.columns if c.name == column), None)
    if own is None or not isinstance(data.state.table(own).encoding, Vocabulary):
        return values.to_numpy()
    names, ids = data.state.table(own).known()
    by_id = {0: None, 1: UNSEEN, **dict(zip(ids.tolist(), names.cast(pl.String).to_list(), strict=True))}
    return values.replace_strict(by_id, return_dtype=pl.String).to_numpy()
