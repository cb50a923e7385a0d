"""The gated look-up: rows of a table, each times the gate of its value, in one gather."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from kernels.dispatch import Implementation, Operator, Workload


def gated_embedding(
    table: Tensor, logits: Tensor, ids: Tensor, sharpness: Tensor, scale: float = 1.0, *, fused: bool = True
) -> Tensor:
    """Return e_v * scale * sigmoid(t s_v) for each value v in ``ids``.

    The gradients of table and logits are of their full shapes, zero for values that ``ids`` lacks.

    Args:
        table: e, (R, d).
        logits: s, one a row of the table, (R,).
        ids: rows of the table, (N,), int32 or int64.
        sharpness: t, shape (); it has no gradient.
        scale: 1 / sigmoid(s_0) in OptFS, where masks begin at 1.
        fused: False computes the definition.

    Returns:
        (N, d).

    Example:
        >>> table, logits = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([0.0, 100.0, -100.0])
        >>> gated_embedding(table, logits, torch.tensor([2, 1, 0]), torch.tensor(10.0), 2.0).T
        tensor([[0., 4., 1.]])

    Source: OptFS, arXiv 2301.10909.
    """
    return OPERATOR(table, logits, ids, sharpness, scale, fused=fused)


def reference(table: Tensor, logits: Tensor, ids: Tensor, sharpness: Tensor, scale: float) -> Tensor:
    """The definition, in plain torch."""
    own = F.embedding(ids, logits.unsqueeze(1))  # (N, 1)
    return F.embedding(ids, table) * (torch.sigmoid(own * sharpness.detach().to(own.dtype)) * scale)


@triton.jit
def _look_up(
    table, logits, ids, sharpness, out, total, scale, width: tl.constexpr,
    block: tl.constexpr, block_width: tl.constexpr,
):  # fmt: skip
    """Some values: their rows, read and written once."""
    place = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    own = place < total
    row = tl.load(ids + place, mask=own, other=0).to(tl.int64)
    s = tl.load(logits + row, mask=own, other=0.0).to(tl.float32)
    mask = tl.sigmoid(s * tl.load(sharpness).to(tl.float32)) * scale
    for start in range(0, width, block_width):
        k = start + tl.arange(0, block_width)
        within = own[:, None] & (k[None, :] < width)
        e = tl.load(table + row[:, None] * width + k[None, :], mask=within, other=0.0).to(tl.float32)
        tl.store(out + place[:, None] * width + k[None, :], e * mask[:, None], mask=within)


@triton.jit
def _look_up_backward(
    gradient, table, logits, ids, order, ends, sharpness, table_out, logits_out, scale, width: tl.constexpr,
    block: tl.constexpr, block_width: tl.constexpr,
):  # fmt: skip
    """All places of one value, by the program of the first: the gradient is summed, then gated, once for all."""
    place = tl.program_id(0).to(tl.int64)
    row = tl.load(ids + place).to(tl.int64)
    before = tl.load(ids + place - 1, mask=place > 0, other=-1).to(tl.int64)
    first = row != before
    end = tl.where(first, tl.load(ends + place).to(tl.int64), place)  # the others take no step
    t = tl.load(sharpness).to(tl.float32)
    mask = tl.sigmoid(tl.load(logits + row).to(tl.float32) * t)
    of_mask = tl.zeros((block_width,), tl.float32)
    for column in range(0, width, block_width):
        k = column + tl.arange(0, block_width)
        summed = tl.zeros((block, block_width), tl.float32)
        for start in range(place, end, block):
            at = start + tl.arange(0, block)
            source = tl.load(order + at, mask=at < end, other=0).to(tl.int64)
            within = (at[:, None] < end) & (k[None, :] < width)
            d = tl.load(gradient + source[:, None] * width + k[None, :], mask=within, other=0.0)
            summed += d.to(tl.float32)
        total = tl.sum(summed, axis=0)
        own = first & (k < width)
        of_mask += total * tl.load(table + row * width + k, mask=own, other=0.0).to(tl.float32)
        tl.store(table_out + row * width + k, total * mask * scale, mask=own)
    tl.store(logits_out + row, tl.sum(of_mask, axis=0) * mask * (1 - mask) * t * scale, mask=first)


def _triton_forward(table: Tensor, logits: Tensor, ids: Tensor, sharpness: Tensor, scale: float) -> tuple[Tensor]:
    table, logits, ids = table.contiguous(), logits.contiguous(), ids.contiguous()
    total, width = len(ids), table.shape[1]
    out = table.new_empty(total, width)
    if total:
        block_width = min(64, triton.next_power_of_2(width))
        _look_up[(triton.cdiv(total, 64),)](
            table, logits, ids, sharpness, out, total, scale, width, 64, block_width
        )
    return (out,)


def _triton_backward(
    gradient: Tensor, table: Tensor, logits: Tensor, ids: Tensor, sharpness: Tensor, scale: float
) -> tuple[Tensor | None, ...]:
    of_table, of_logits = torch.zeros_like(table), torch.zeros_like(logits)
    total, width = len(ids), table.shape[1]
    if total:
        values, order = torch.sort(ids, stable=True)
        ends = torch.searchsorted(values, values, right=True)
        block_width = min(64, triton.next_power_of_2(width))
        _look_up_backward[(total,)](
            gradient.contiguous(), table.contiguous(), logits.contiguous(), values, order, ends, sharpness,
            of_table, of_logits, scale, width, 16, block_width,
        )  # fmt: skip
    return of_table, of_logits, None, None, None


def _cpu_forward(
    table: Tensor, logits: Tensor, ids: Tensor, sharpness: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    mask = logits.index_select(0, ids).mul_(sharpness).sigmoid_()  # (N,)
    return table.index_select(0, ids).mul_((mask * scale).unsqueeze(1)), mask


def _cpu_backward(
    gradient: Tensor, table: Tensor, logits: Tensor, ids: Tensor, sharpness: Tensor, scale: float, mask: Tensor
) -> tuple[Tensor | None, ...]:
    slope = table.index_select(0, ids).mul_(gradient).sum(1)
    slope.mul_(mask).addcmul_(slope, mask, value=-1).mul_(sharpness).mul_(scale)
    of_logits = torch.zeros_like(logits).index_add_(0, ids, slope)
    weighed = gradient * (mask * scale).unsqueeze(1)
    return torch.zeros_like(table).index_add_(0, ids, weighed), of_logits, None, None, None


def _fits(table: Tensor, logits: Tensor, ids: Tensor, sharpness: Tensor) -> bool:
    """Whether there is one logit of the table's type for each of its rows, and the ids are in a row."""
    return (
        table.dim() == 2
        and logits.shape == table.shape[:1]
        and logits.dtype == table.dtype
        and ids.dim() == 1
        and ids.dtype in (torch.int32, torch.int64)
        and sharpness.numel() == 1
        and table.is_contiguous()
        and logits.is_contiguous()
    )


def _triton_allows(table: Tensor, logits: Tensor, ids: Tensor, sharpness: Tensor, scale: float) -> bool:
    return table.dtype in (torch.float32, torch.bfloat16, torch.float16) and _fits(table, logits, ids, sharpness)


def _cpu_allows(table: Tensor, logits: Tensor, ids: Tensor, sharpness: Tensor, scale: float) -> bool:
    return table.dtype in (torch.float32, torch.float64) and _fits(table, logits, ids, sharpness)


def _outputs(table: Tensor, logits: Tensor, ids: Tensor, sharpness: Tensor, scale: float) -> tuple[Tensor]:
    return (table.new_empty(len(ids), table.shape[1]),)


def _example(
    generator: torch.Generator, device: str, dtype: torch.dtype, *, rows: int, values: int, width: int
) -> tuple[object, ...]:
    table, logits = (torch.randn(size, generator=generator) for size in [(values, width), (values,)])
    # Some values are met far more often than others, as they are in logs.
    ids = (torch.rand(rows, generator=generator).square() * values).long()
    return table.to(device, dtype), logits.to(device, dtype), ids.to(device), torch.tensor(2.0, device=device), 1.5


def _moved(table: Tensor, logits: Tensor, ids: Tensor, sharpness: Tensor, scale: float) -> int:
    return len(ids) * ((2 * table.shape[1] + 1) * table.element_size() + ids.element_size())


def _computed(table: Tensor, logits: Tensor, ids: Tensor, sharpness: Tensor, scale: float) -> int:
    return len(ids) * table.shape[1]


OPERATOR = Operator(
    "gated_embedding",
    reference,
    "Tensor table, Tensor logits, Tensor ids, Tensor sharpness, float scale",
    (
        Implementation("triton", "cuda", _triton_allows, _triton_forward, _triton_backward, _outputs),
        Implementation("cpu", "cpu", _cpu_allows, _cpu_forward, _cpu_backward),
    ),
    Workload(
        _example,
        tuple(
            {"rows": rows, "values": values, "width": 16}
            for rows in (512, 16384, 163840)
            for values in (10_000, 1_000_000)
        ),
        _moved,
        _computed,
    ),
)
