"""Probabilities for the rows of a split, in their order."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from ctr_models.batch import Batch
from ctr_models.model import CTRModel
from ctr_models.schema import Schema
from pipelines.evaluation.metrics import evaluate
from pipelines.features.spec import LABEL, task_label
from pipelines.features.transform import ROW, USER
from pipelines.training.distributed import Ranks
from pipelines.training.loader import Loader

if TYPE_CHECKING:
    from pipelines.features.prepare import EncodedData


@dataclass(frozen=True)
class Predictions:
    """What a model says of a split, row by row.

    Args:
        label: 0 or 1, (N,) float32.
        probability: of a click, (N,) float64.
        user: stable hash of the user, (N,) int64.
        row: number of the row in the raw data, (N,) int64.
        tasks: of each further task that the model predicts, the rows whose label is known.
    """

    label: np.ndarray
    probability: np.ndarray
    user: np.ndarray
    row: np.ndarray
    tasks: Mapping[str, Predictions] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.label)

    def metrics(self) -> dict[str, float]:
        """Return the metrics that are defined; a further task's carry its name, as ``auc_conversion``.

        GAUC is defined where a user has both labels; a further task has metrics where both of its labels are known.

        Raises:
            DataError: the rows don't have both labels.
        """
        found = evaluate(self.label, self.probability, self.user)
        found = {name: value for name, value in found.items() if not math.isnan(value)}
        for task, own in self.tasks.items():
            if np.unique(own.label).size == 2:
                found |= {f"{name}_{task}": value for name, value in own.metrics().items()}
        return found


def predict(model: CTRModel, data: EncodedData, split: str, *, batch_size: int = 16384) -> Predictions:
    """Score a split with an unsharded model.

    Args:
        model: is left in evaluation mode.
        data: encoded with the model's features.
        split: ``train``, ``valid`` or ``test``.
        batch_size: rows a forward pass; bounds the memory, not the result.

    Returns:
        Every row once, in the order of the files.
    """
    model.eval()
    device = next(model.parameters()).device

    @torch.no_grad()
    def logits(batch: Batch) -> Tensor:
        return model.task_logits(batch)

    me = Ranks(0, 1, device)
    return score(logits, data, split, model.schema, batch_size=batch_size, me=me, tasks=model.tasks)


def score(
    logits: Callable[[Batch], Tensor],
    data: EncodedData,
    split: str,
    schema: Schema,
    *,
    batch_size: int,
    me: Ranks,
    tasks: Sequence[str] = (),
) -> Predictions:
    """Score a split, each rank its own stretch of the rows.

    Args:
        logits: of the click and of each further task, (B, 1 + T), from a batch on the ranks' device; every rank
            calls it equally often.
        data: the encoded features.
        split: ``train``, ``valid`` or ``test``.
        schema: inputs of the model.
        batch_size: rows a forward pass over all ranks; rounded up to a multiple of the ranks.
        me: this process.
        tasks: the further tasks.

    Returns:
        Every row once, in the order of the files, on every rank.
    """
    files = data.files(split)
    size = -(-batch_size // me.world) * me.world
    loader = Loader(
        files, schema, batch_size=size, parts=me.world, rank=me.rank, world=me.world, window_rows=4 * size
    )
    found = [logits(batch.to(me.device)).cpu() for batch in loader]
    own = torch.cat(found)[: loader.rows]  # a part one row short was filled up with its first
    probability = me.concatenate(torch.sigmoid(own.double()).numpy())  # (N, 1 + T)
    columns = [LABEL, USER, ROW, *map(task_label, tasks)]
    table = pa.concat_tables([pq.read_table(file, columns=columns) for file in files])
    label, user, row, *further = (table.column(name).to_numpy() for name in columns)
    known = {}
    for place, (task, own_label) in enumerate(zip(tasks, further, strict=True), 1):
        there = ~np.isnan(own_label)
        known[task] = Predictions(own_label[there], probability[there, place], user[there], row[there])
    return Predictions(label, np.ascontiguousarray(probability[:, 0]), user, row, known)
