"""A model in evaluation as a TorchScript program on CPU: no Python, and products by the faster library."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ctr_models.batch import Batch, EncodedRows
from ctr_models.candidates import Candidates
from ctr_models.export import TensorModel, keyed
from ctr_models.int8 import definitions
from ctr_models.layers.mlp import MLP
from ctr_models.model import CTRModel
from ctr_models.schema import Schema
from kernels.product import LEAST, fast_products

Program = Callable[..., Tensor]


class RowScores(nn.Module):
    """Click probabilities of plain rows, (B,), from the tensors of :func:`ctr_models.export.tensors`.

    Args:
        model: in evaluation mode.

    Example:
        >>> from ctr_models import Schema, create_model, example_batch
        >>> from ctr_models.export import tensors
        >>> schema = Schema.of({"user": 10, "item": 20})
        >>> RowScores(create_model("dnn", schema).eval())(*tensors(example_batch(schema, rows=3))).shape
        torch.Size([3])
    """

    def __init__(self, model: CTRModel) -> None:
        super().__init__()
        self.model = TensorModel(model)

    def forward(self, *batch: Tensor) -> Tensor:
        """Return probabilities, (B,)."""
        return torch.sigmoid(self.model(*batch).float())


class CandidateScores(nn.Module):
    """Click probabilities of the candidates of users, (N,), from the tensors of :func:`candidate_tensors`.

    Args:
        model: in evaluation mode, whose forward takes candidates.
        shared: the schema of the users, without lists.
        own: that of the candidates, likewise.

    Example:
        >>> from ctr_models import Schema, create_model, example_rows
        >>> schema = Schema.of({"user": 10, "item": 20})
        >>> shared, own = schema.only(["user"]), schema.only(["item"])
        >>> given = candidate_tensors(example_rows(shared, rows=1), example_rows(own, rows=5), [5])
        >>> CandidateScores(create_model("dnn", schema).eval(), shared, own)(*given).shape
        torch.Size([5])
    """

    def __init__(self, model: CTRModel, shared: Schema, own: Schema) -> None:
        super().__init__()
        self.model, self._shared, self._own = model, shared, own
        self._names = frozenset(f.name for f in shared.fields)

    def forward(
        self, shared_dense: Tensor, shared_ids: Tensor, dense: Tensor, ids: Tensor, offsets: Tensor
    ) -> Tensor:
        """Return probabilities, (N,).

        Args:
            shared_dense: numbers of the users, (U, C) float32.
            shared_ids: their ids, field after field, (F * U,) int32.
            dense: numbers of the candidates, (N, D) float32.
            ids: their ids, field after field, (G * N,) int32.
            offsets: where each user's candidates begin, and N at the end, (U + 1,).
        """
        users, rows = _batch(self._shared, shared_dense, shared_ids), _batch(self._own, dense, ids)
        return torch.sigmoid(self.model(Candidates(users, rows, offsets, self._names)).float())


def candidate_tensors(shared: EncodedRows, own: EncodedRows, counts: Sequence[int]) -> tuple[Tensor, ...]:
    """Return what :class:`CandidateScores` takes, from encoded rows without lists.

    Args:
        shared: the users.
        own: the candidates, one user's after the other.
        counts: candidates of each user; those that :func:`filled` has added are the last one's.
    """
    offsets = np.cumsum([0, *counts])
    offsets[-1] = len(own)
    parts = (shared.dense, shared.single.reshape(-1), own.dense, own.single.reshape(-1), offsets)
    return tuple(map(torch.from_numpy, parts))


def filled(rows: EncodedRows) -> EncodedRows:
    """Return rows without lists in one of a few numbers, 62 of them up to 2,048: the last stands there repeatedly.

    oneDNN takes half a millisecond to make the code of a product of a new shape, and keeps that of a thousand.

    Example:
        >>> from ctr_models import Schema, example_rows
        >>> schema = Schema.of({"item": 9})
        >>> [len(filled(example_rows(schema, rows=rows))) for rows in (1, 15, 17, 100, 500, 2000)]
        [1, 15, 24, 104, 512, 2048]
    """
    there = len(rows)
    more = -there % max(8, 1 << there.bit_length() - 4) if there >= 16 else 0
    if not more or not fast_products():
        return rows
    index = np.minimum(np.arange(there + more), there - 1)
    return replace(
        rows,
        dense=rows.dense.take(index, axis=0),
        single=rows.single.take(index, axis=1),
        label=rows.label.take(index),
        group=rows.group.take(index),
    )


def traced(scores: nn.Module, given: tuple[Tensor, ...], *modes: AbstractContextManager[Any]) -> Program:
    """Return a module as a program, for tensors of any number of rows.

    A trace knows the definitions of operators alone. What takes it long among them, the products of many rows,
    goes to oneDNN where that is faster than MKL, as the operators' fast ways do.

    Args:
        scores: :class:`RowScores` or :class:`CandidateScores`, in evaluation mode.
        given: what it takes, of two rows or more. A single user is no user among several: what is traced with one
            is for one.
        modes: entered while it is traced.

    Example:
        >>> from ctr_models import Schema, create_model, example_batch
        >>> from ctr_models.export import tensors
        >>> schema = Schema.of({"user": 10, "item": 20})
        >>> program = traced(RowScores(create_model("dnn", schema).eval()), tensors(example_batch(schema, rows=3)))
        >>> program(*tensors(example_batch(schema, rows=7))).shape
        torch.Size([7])
    """
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # what the tracer says of Python numbers
        stack.enter_context(torch.no_grad())
        stack.enter_context(definitions(scores))
        if fast_products():
            stack.enter_context(_FastProducts())
        for mode in modes:
            stack.enter_context(mode)
        return torch.jit.freeze(torch.jit.trace(scores.eval(), given, check_trace=False))


def folded(model: CTRModel) -> CTRModel:
    """Return a model that scores alike, with the batch norms of its perceptrons folded into their linear layers.

    W' = W g / s and b' = (b - m) g / s + c, for a norm of mean m, standard deviation s, scale g and shift c.

    Args:
        model: in evaluation mode. All else, its tables above all, is shared with it, not copied.

    Example:
        >>> from ctr_models import Schema, create_model
        >>> model = create_model("dnn", Schema.of({"item": 20}), mlp={"hidden": [8], "batch_norm": True}).eval()
        >>> [type(layer).__name__ for layer in folded(model).mlp]
        ['Linear', 'ReLU', 'Linear']
    """
    same = {id(one): one for one in (*model.parameters(), *model.buffers())}
    made = copy.deepcopy(model, same)  # type: ignore[arg-type]
    for perceptron in [one for one in made.modules() if isinstance(one, MLP)]:
        for place in reversed(range(1, len(perceptron))):
            linear, norm = perceptron[place - 1], perceptron[place]
            if isinstance(norm, nn.BatchNorm1d) and type(linear) is nn.Linear:
                perceptron[place - 1] = nn.utils.fuse_linear_bn_eval(linear, norm)
                del perceptron[place]
    return made


@torch.jit.script
def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # 2**20: half of kernels.product.WORTH, which is for any threads; programs are run by one.
    if x.shape[0] * weight.numel() >= 1048576:
        return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


class _FastProducts(TorchFunctionMode):
    """Lets linear layers choose their library when the program runs."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is F.linear and args[0].dim() == 2 and min(args[1].shape) >= LEAST:
            return _product(args[0], args[1], args[2] if len(args) > 2 else kwargs.get("bias"))
        return function(*args, **kwargs)


def _batch(schema: Schema, dense: Tensor, ids: Tensor) -> Batch:
    rows = dense.shape[0]
    nothing, none = dense.new_zeros(rows), ids[:0]
    return Batch(
        dense=dense,
        sparse=keyed(schema.sparse, ids, torch.ones_like(ids), rows),
        sequences=keyed((), none, none, rows),
        label=nothing,
        group=nothing,
    )
