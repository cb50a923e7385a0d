"""The best that any model can do, where the true click probability is known."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipelines.evaluation.metrics import evaluate

if TYPE_CHECKING:
    from pipelines.features.prepare import EncodedData


def best_possible(data: EncodedData, split: str) -> dict[str, float]:
    """Return the metrics of the true probabilities themselves; empty where they are not known.

    Args:
        data: encoded features; ``data.truth`` names the column.
        split: ``train``, ``valid`` or ``test``.
    """
    if data.truth is None:
        return {}
    frame = data.frame(split).select("__label__", "__user__", data.truth).collect()
    return evaluate(
        frame["__label__"].to_numpy(), frame[data.truth].cast(float).to_numpy(), frame["__user__"].to_numpy()
    )
