"""Golden rows: some raw rows as a request would give them, histories included."""

from __future__ import annotations

import polars as pl

from pipelines.features.spec import Column, FeatureSpec


def golden_rows(frame: pl.LazyFrame, spec: FeatureSpec, *, rows: int = 32) -> pl.DataFrame:
    """Take rows of a log for :meth:`pipelines.release.bundle.Bundle.create`.

    Without histories the first rows serve, so that a long file is not read to its end. With histories that the
    spec makes from the log it is the last rows, with the clicks that led up to them as lists.

    Args:
        frame: raw rows, ordered by time if the spec has histories.
        spec: says which columns a request gives.
        rows: how many.

    Returns:
        The columns of a request that the log has, and a list column for each history made from the log.

    Example:
        >>> spec = FeatureSpec.model_validate({
        ...     "label": "click", "user": "user", "timestamp": "time",
        ...     "columns": [{"name": "item", "kind": "categorical"},
        ...                 {"name": "past", "kind": "sequence", "table": "item", "from_log": {"column": "item"}}]})
        >>> log = pl.LazyFrame({"click": [1, 0, 1], "user": [7, 7, 7], "time": [1, 2, 3], "item": ["a", "b", "c"]})
        >>> golden_rows(log, spec, rows=2).to_dicts()
        [{'item': 'b', 'past': ['a']}, {'item': 'c', 'past': ['a']}]
    """
    made = [c for c in spec.columns if c.from_log]
    given = [c for c in spec.request_columns if c in frame.collect_schema().names()]
    chosen = (frame.tail(rows) if made else frame.head(rows)).collect()
    out = chosen.select(given)
    for column in made:
        if column.name not in given:
            out = out.with_columns(_history(frame, chosen, spec, column))
    return out


def _history(frame: pl.LazyFrame, chosen: pl.DataFrame, spec: FeatureSpec, column: Column) -> pl.Series:
    """For each chosen row, the user's values strictly before its time, oldest first."""
    assert column.from_log is not None
    assert spec.user is not None
    assert spec.timestamp is not None
    user, time, value = spec.user, spec.timestamp, column.from_log.column
    log = frame.filter(pl.col(user).is_in(chosen[user].unique().implode()))
    if column.from_log.label is not None:
        log = log.filter(pl.col(spec.label).cast(pl.Float64) == column.from_log.label)
    events = log.select(user, pl.col(time).alias("__when__"), pl.col(value).alias("__value__")).collect(
        engine="streaming"
    )
    numbered = chosen.select(user, time).with_row_index("__index__")
    past = (
        numbered.join(events.with_row_index("__order__"), on=user)
        .filter(pl.col("__when__") < pl.col(time))
        .sort("__when__", "__order__")
        .group_by("__index__")
        .agg(pl.col("__value__").tail(column.max_length))
    )
    joined = numbered.join(past, on="__index__", how="left", maintain_order="left")
    return joined["__value__"].alias(column.name)
