"""A model as a program of plain tensors, free of Python: for serving, and to prove that it can be had."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from ctr_models.batch import Batch
from ctr_models.example import example_batch
from ctr_models.model import CTRModel


class TensorModel(nn.Module):
    """Takes the tensors of a batch instead of the batch: torch.export and torch.compile see the whole model.

    Args:
        model: an unsharded model.

    Example:
        >>> from ctr_models import Schema, create_model, example_batch
        >>> schema = Schema.of({"user": 10, "item": 20}, dense=["price"])
        >>> model, batch = create_model("dnn", schema), example_batch(schema, rows=3)
        >>> bool((TensorModel(model)(*tensors(batch)) == model(batch)).all())
        True
    """

    def __init__(self, model: CTRModel) -> None:
        super().__init__()
        self.model = model
        self._sparse = [f.name for f in model.schema.sparse]
        self._sequences = [f.name for f in model.schema.sequences]

    def forward(
        self, dense: Tensor, ids: Tensor, lengths: Tensor, history_ids: Tensor, history_lengths: Tensor
    ) -> Tensor:
        """Return logits, (B,).

        Args:
            dense: (B, N) float32.
            ids: of all categorical and multi fields, field after field, (total,) int32.
            lengths: ids a row, field after field, (F * B,) int32.
            history_ids: of all sequences, (total,) int32.
            history_lengths: (S * B,) int32.
        """
        rows = dense.shape[0]
        nothing = dense.new_zeros(rows)
        return self.model(
            Batch(
                dense=dense,
                sparse=KeyedJaggedTensor(keys=self._sparse, values=ids, lengths=lengths, stride=rows),
                sequences=KeyedJaggedTensor(
                    keys=self._sequences, values=history_ids, lengths=history_lengths, stride=rows
                ),
                label=nothing,
                group=nothing,
            )
        )


def tensors(batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return what :class:`TensorModel` takes, from a batch."""
    return (
        batch.dense,
        batch.sparse.values(),
        batch.sparse.lengths(),
        batch.sequences.values(),
        batch.sequences.lengths(),
    )


def export(model: CTRModel) -> ExportedProgram:
    """Export the whole model, embeddings included, for any number of rows.

    Args:
        model: an unsharded model; exported in evaluation mode.

    Returns:
        A program that takes the five tensors of :func:`tensors`.

    Example:
        >>> from ctr_models import Schema, create_model, example_batch
        >>> schema = Schema.of({"user": 10, "item": 20})
        >>> program = export(create_model("lr", schema))
        >>> program.module()(*tensors(example_batch(schema, rows=7))).shape
        torch.Size([7])
    """
    was_training = model.training
    any_size = {0: Dim.AUTO}
    histories = any_size if model.schema.sequences else None
    ids = any_size if model.schema.sparse else None
    try:
        # Strict: the non-strict tracer unrolls KeyedJaggedTensor.to_dict with a guard a field.
        return torch.export.export(
            TensorModel(model.eval()),
            tensors(example_batch(model.schema, rows=8)),
            dynamic_shapes=(any_size, ids, ids, histories, histories),
            strict=True,
        )
    finally:
        model.train(was_training)
