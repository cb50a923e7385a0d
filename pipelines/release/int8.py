"""What a Bundle knows of its model in eight bits: which layers bear it, and what the scores lose."""

from __future__ import annotations

import numpy as np
import torch
from pydantic import Field

from ctr_models.batch import EncodedRows
from ctr_models.int8 import Int8, Observed, Ranges, definitions, supported
from ctr_models.model import CTRModel
from pipelines.evaluation.metrics import auc, logloss
from pipelines.release.part import Part

LARGEST, AUC_CHANGE = 1e-3, 1e-4
"""Most that a probability, and the AUC, of rows that the model did not learn from may change."""
_BATCH = 4096


class Int8Card(Part):
    """Layers that may be computed in eight bits: all but those that would change the scores too much.

    Each layer is tried alone on training rows, where the ranges of its inputs come from too. Those that change the
    scores least are taken, as many as leave probabilities within 1e-3 and the AUC within 1e-4 on rows that the
    model did not learn from. A gate's layers mostly are among them, a perceptron's first ones mostly not.

    Args:
        ranges: by the name of a layer's weight, the least and the greatest of its inputs.
        rows: that were scored both ways.
        auc: in float32.
        auc_change: int8 less float32.
        logloss_change: int8 less float32.
        largest: difference of two probabilities.
    """

    what = "the int8 card"
    ranges: dict[str, tuple[float, float]] = Field(min_length=1)
    rows: int = Field(ge=1)
    auc: float = Field(ge=0, le=1)
    auc_change: float = Field(ge=-AUC_CHANGE, le=AUC_CHANGE)
    logloss_change: float
    largest: float = Field(ge=0, le=LARGEST)

    @classmethod
    def of(cls, model: CTRModel, seen: EncodedRows, unseen: EncodedRows) -> Int8Card | None:
        """Measure a model.

        Args:
            model: in evaluation mode, on CPU.
            seen: encoded training rows.
            unseen: encoded rows with labels of both kinds.

        Returns:
            None if no layer bears eight bits, the machine has no such products, the model has lists, whose forward
            pass can't be a program, or the rows have one label only.
        """
        lists = model.schema.sequences or any(f.kind != "categorical" for f in model.schema.sparse)
        if lists or not supported() or len(np.unique(unseen.label)) < 2:
            return None
        with torch.no_grad(), definitions(model):
            with Observed(model) as observed:
                some = scores(model, seen)[:_BATCH]
            exact = scores(model, unseen)
            if not (np.isfinite(some).all() and np.isfinite(exact).all()):
                return None
            alone = {
                name: float(np.abs(_in_int8(model, {name: limits}, seen, _BATCH) - some).max())
                for name, limits in observed.ranges.items()
            }
            chosen = sorted((name for name, apart in alone.items() if apart <= LARGEST), key=alone.__getitem__)
            before = auc(unseen.label, exact)
            while chosen:
                ranges = {name: observed.ranges[name] for name in chosen}
                found = _in_int8(model, ranges, unseen)
                largest, change = float(np.abs(found - exact).max()), auc(unseen.label, found) - before
                if largest <= LARGEST and abs(change) <= AUC_CHANGE:
                    return cls(
                        ranges=ranges,
                        rows=len(unseen),
                        auc=before,
                        auc_change=change,
                        logloss_change=logloss(unseen.label, found) - logloss(unseen.label, exact),
                        largest=largest,
                    )
                chosen.pop()
        return None


def scores(model: CTRModel, rows: EncodedRows, most: int | None = None) -> np.ndarray:
    """Return a model's click probabilities of encoded rows, or of the first of them, (N,) float32."""
    count = len(rows) if most is None else min(most, len(rows))
    with torch.no_grad():
        parts = [
            torch.sigmoid(model(rows.batch(slice(i, min(i + _BATCH, count)))).float()).numpy()
            for i in range(0, count, _BATCH)
        ]
    return np.concatenate(parts)


def _in_int8(model: CTRModel, ranges: Ranges, rows: EncodedRows, most: int | None = None) -> np.ndarray:
    with Int8(model, ranges):
        return scores(model, rows, most)
