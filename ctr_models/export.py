"""A model as a program of plain tensors, free of Python: for serving, and to prove that it can be had."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from ctr_models.batch import Batch
from ctr_models.example import example_batch
from ctr_models.model import CTRModel
from ctr_models.schema import IdField


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
                sparse=keyed(self.model.schema.sparse, ids, lengths, rows),
                sequences=keyed(self.model.schema.sequences, history_ids, history_lengths, rows),
                label=nothing,
                group=nothing,
            )
        )


def keyed(fields: tuple[IdField, ...], ids: Tensor, lengths: Tensor, rows: int) -> KeyedJaggedTensor:
    """Return ids by field; inside a program, where nothing may be asked of their values that it need not know.

    Args:
        fields: in their order.
        ids: field after field, (total,).
        lengths: ids a row, field after field, (F * B,); of fields with one id a row they are not looked at.
        rows: B.
    """
    # A categorical field has one id a row: told so, the program need not count them, and takes a batch of 1.
    per_key: list[int] = []
    for i, f in enumerate(fields):
        if f.kind == "categorical":
            per_key.append(rows)
        else:
            count = lengths[i * rows : (i + 1) * rows].sum().item()
            torch._check(count >= 0)
            per_key.append(count)  # type: ignore[arg-type]
    return KeyedJaggedTensor(
        keys=[f.name for f in fields], values=ids, lengths=lengths, stride=rows, length_per_key=per_key
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
    schema = model.schema
    rows = Dim("rows", min=1, max=2**20)
    ragged = any(f.kind == "multi" for f in schema.sparse)
    count, histories = len(schema.sparse), len(schema.sequences)
    shapes = (
        {0: rows},
        {0: Dim("ids", min=0, max=2**30) if ragged else count * rows} if count else None,
        {0: count * rows} if count else None,
        {0: Dim("history_ids", min=0, max=2**30)} if histories else None,
        {0: histories * rows} if histories else None,
    )
    try:
        # Strict: the non-strict tracer unrolls KeyedJaggedTensor.to_dict with a guard a field.
        return torch.export.export(
            TensorModel(model.eval()),
            tensors(example_batch(schema, rows=8)),
            dynamic_shapes=shapes,
            strict=True,
        )
    finally:
        model.train(was_training)
