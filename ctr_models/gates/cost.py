"""What a gate, or any computation, costs: parameters, and floating-point operations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ctr_models.gates.probe import Case, Sizes, Use, inputs

EXAMPLE = Sizes(rows=8, fields=10, dim=16, width=160, context=32, choices=4, heads=2, history=20, even=True)
"""Ten fields of dimension 16 and a context of two more; four experts; two heads; histories of twenty."""

_aten = torch.ops.aten
ARITHMETIC = {
    *(_aten._softmax, _aten._log_softmax, _aten.cumsum, _aten.logsumexp, _aten.native_layer_norm),
    *(_aten.index_add, _aten.index_add_, _aten.topk, _aten.sort),
}
"""Operations that torch tags neither as elementwise nor as a reduction."""


@dataclass(frozen=True)
class Cost:
    """What a gate costs beside gate ``none`` in the same place.

    Args:
        parameters: of the gate; logits in tables of their own are not among them.
        flops: operations a row of a forward pass: two for each multiply-add of a matrix product; of an elementwise
            operation, a reduction, a softmax and the like one for each value taken in or given out, whichever are
            more. What is computed once a batch is not among them.
    """

    parameters: int
    flops: float


def cost(case: Case, sizes: Sizes = EXAMPLE) -> Cost:
    """Return what a gate costs in a slot, counted on inputs of these sizes, in evaluation.

    Example:
        >>> cost(Case("sigmoid", "cross", True), Sizes(width=10, context=10))
        Cost(parameters=100, flops=220.0)
    """
    use = case.use(sizes)
    own = _flops_a_row(case, use, sizes) - _flops_a_row(case, case.control(sizes), sizes)
    return Cost(parameters=sum(p.numel() for p in use.parameters()), flops=max(0.0, own))


@torch.no_grad()
def operations(compute: Callable[[], object]) -> int:
    """Return how many floating-point operations a computation makes, counted as in :class:`Cost`.

    What torch knows no operation for, such as the look-up in a fused table, counts as none.

    Example:
        >>> operations(lambda: torch.zeros(2, 3) @ torch.zeros(3, 5))
        60
    """
    with _Counter() as counter:
        compute()
    return counter.flops


@torch.no_grad()
def _flops_a_row(case: Case, use: Use, sizes: Sizes) -> float:
    use.eval()
    counts = []
    for rows in (sizes.rows, 2 * sizes.rows):  # the difference leaves out what is done once a batch
        given = inputs(case, use.gate, replace(sizes, rows=rows))
        counts.append(operations(lambda given=given: use(*given)))  # type: ignore[misc]
    return (counts[1] - counts[0]) / sizes.rows


class _Counter(TorchDispatchMode):
    """Counts the operations of what runs inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        products = flop_registry.get(func.overloadpacket)
        if products is not None:
            self.flops += products(*args, **kwargs, out_val=out)
        elif func.overloadpacket in ARITHMETIC or {torch.Tag.pointwise, torch.Tag.reduction} & set(func.tags):
            tensors = (*args, *(out if isinstance(out, tuple) else (out,)))
            self.flops += max(v.numel() for v in tensors if isinstance(v, Tensor))
        return out
