"""The context-aware feature gate: the last product of its perceptron, the sigmoid, and what it gates."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from kernels.dispatch import Implementation, Operator, Workload, product_type
from kernels.product import product, summed_product


def feature_gate(
    x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None = None, *, fused: bool = True
) -> Tensor:
    """Return 2 sigmoid(W h + b) * x: logits of zero pass ``x`` unchanged.

    Where one context serves the whole batch, its logits are computed once, not once a row.

    Args:
        x: what is gated, (B, D), or (B, F, d) with one mask a field.
        hidden: h, the last hidden layer of the gate's perceptron, (B, H); (1, H) when all rows share it.
        weight: W, (D, H), or (F, H) with one mask a field.
        bias: b, (D,) or (F,); None stands for 0.
        fused: False computes the definition.

    Returns:
        Shape of ``x``.

    Example:
        >>> x, hidden, weight = torch.tensor([[1.0, -2.0]]), torch.ones(1, 1), torch.zeros(2, 1)
        >>> feature_gate(x, hidden, weight), feature_gate(x, hidden, weight, torch.tensor([100.0, 0.0]))
        (tensor([[ 1., -2.]]), tensor([[ 2., -2.]]))

    Source: FinalMLP, arXiv 2304.00902.
    """
    return OPERATOR(x, hidden, weight, bias, fused=fused)


def reference(x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The definition, in plain torch."""
    # Doubled on the mask's side, which may have one row where x has B.
    mask = 2 * torch.sigmoid(F.linear(hidden, weight, bias))  # (B or 1, D or F)
    return x * (mask.unsqueeze(2) if x.dim() == 3 else mask)


@triton.jit
def _mask(
    hidden, weight, bias, row, unit, rows, units: tl.constexpr, width: tl.constexpr, shared: tl.constexpr,
    biased: tl.constexpr, product: tl.constexpr,
    block_rows: tl.constexpr, block_units: tl.constexpr, block_inner: tl.constexpr,
):  # fmt: skip
    """Twice the sigmoid of a tile of logits, (block_rows, block_units), or (1, block_units) of a shared context."""
    if shared:
        alone = tl.zeros((block_units,), tl.float32)
        for start in range(0, width, block_inner):
            k = start + tl.arange(0, block_inner)
            of_weight = (unit[:, None] < units) & (k[None, :] < width)
            w = tl.load(weight + unit[:, None] * width + k[None, :], mask=of_weight, other=0.0).to(tl.float32)
            h = tl.load(hidden + k, mask=k < width, other=0.0).to(tl.float32)
            alone += tl.sum(w * h[None, :], axis=1)
        asked = alone[None, :]
    else:
        asked = tl.zeros((block_rows, block_units), tl.float32)
        for start in range(0, width, block_inner):
            k = start + tl.arange(0, block_inner)
            read = (row[:, None] < rows) & (k[None, :] < width)
            of_weight = (unit[None, :] < units) & (k[:, None] < width)
            h = tl.load(hidden + row[:, None].to(tl.int64) * width + k[None, :], mask=read, other=0.0)
            w = tl.load(weight + unit[None, :] * width + k[:, None], mask=of_weight, other=0.0)
            asked = tl.dot(h.to(product), w.to(product), asked, input_precision="ieee")
    if biased:
        asked += tl.load(bias + unit, mask=unit < units, other=0.0).to(tl.float32)[None, :]
    return 2 * tl.sigmoid(asked)


@triton.jit
def _gate(
    x, hidden, weight, bias, out, rows, units: tl.constexpr, each: tl.constexpr, width: tl.constexpr,
    shared: tl.constexpr, biased: tl.constexpr, product: tl.constexpr, steps: tl.constexpr,
    block_rows: tl.constexpr, block_units: tl.constexpr, block_each: tl.constexpr, block_inner: tl.constexpr,
):  # fmt: skip
    """Some rows of some units: their mask in registers, then ``each`` values a unit. ``steps`` > 1 if shared."""
    first = tl.program_id(0) * block_rows * steps
    row = first + tl.arange(0, block_rows)
    unit = tl.program_id(1) * block_units + tl.arange(0, block_units)
    mask = _mask(
        hidden, weight, bias, row, unit, rows, units, width, shared, biased, product,
        block_rows, block_units, block_inner,
    )  # fmt: skip
    for step in range(steps):
        row = first + step * block_rows + tl.arange(0, block_rows)
        own = (row[:, None] < rows) & (unit[None, :] < units)
        place = row[:, None].to(tl.int64) * units + unit[None, :]
        if each == 1:
            value = tl.load(x + place, mask=own, other=0.0).to(tl.float32)
            tl.store(out + place, value * mask, mask=own)
        else:
            for start in range(0, each, block_each):
                e = start + tl.arange(0, block_each)
                inner = own[:, :, None] & (e[None, None, :] < each)
                at = place[:, :, None] * each + e[None, None, :]
                value = tl.load(x + at, mask=inner, other=0.0).to(tl.float32)
                tl.store(out + at, value * mask[:, :, None], mask=inner)


@triton.jit
def _gate_backward(
    gradient, x, hidden, weight, bias, x_out, logits_out, rows,
    units: tl.constexpr, each: tl.constexpr, width: tl.constexpr,
    shared: tl.constexpr, biased: tl.constexpr, product: tl.constexpr, steps: tl.constexpr,
    block_rows: tl.constexpr, block_units: tl.constexpr, block_each: tl.constexpr, block_inner: tl.constexpr,
):  # fmt: skip
    """The same tiles: the gradients of x and of the logits, of a shared context summed over the program's rows."""
    first = tl.program_id(0) * block_rows * steps
    row = first + tl.arange(0, block_rows)
    unit = tl.program_id(1) * block_units + tl.arange(0, block_units)
    mask = _mask(
        hidden, weight, bias, row, unit, rows, units, width, shared, biased, product,
        block_rows, block_units, block_inner,
    )  # fmt: skip
    summed = tl.zeros((block_rows, block_units), tl.float32)
    for step in range(steps):
        row = first + step * block_rows + tl.arange(0, block_rows)
        own = (row[:, None] < rows) & (unit[None, :] < units)
        place = row[:, None].to(tl.int64) * units + unit[None, :]
        if each == 1:
            d = tl.load(gradient + place, mask=own, other=0.0).to(tl.float32)
            summed += d * tl.load(x + place, mask=own, other=0.0).to(tl.float32)
            tl.store(x_out + place, d * mask, mask=own)
        else:
            for start in range(0, each, block_each):
                e = start + tl.arange(0, block_each)
                inner = own[:, :, None] & (e[None, None, :] < each)
                at = place[:, :, None] * each + e[None, None, :]
                d = tl.load(gradient + at, mask=inner, other=0.0).to(tl.float32)
                summed += tl.sum(d * tl.load(x + at, mask=inner, other=0.0).to(tl.float32), axis=2)
                tl.store(x_out + at, d * mask[:, :, None], mask=inner)
    slope = summed * mask * (1 - 0.5 * mask)
    if shared:
        tl.store(logits_out + tl.program_id(0) * units + unit, tl.sum(slope, axis=0), mask=unit < units)
    else:
        own = (row[:, None] < rows) & (unit[None, :] < units)
        tl.store(logits_out + row[:, None].to(tl.int64) * units + unit[None, :], slope, mask=own)


def _plan(
    x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[tuple[int, int], tuple[object, ...]]:
    """Return the grid, and all that both kernels take after the tensors."""
    rows, units, width = len(x), x.shape[1], hidden.shape[1]
    each = x.shape[2] if x.dim() == 3 else 1
    shared = len(hidden) == 1
    block, block_each = (64, 1) if each == 1 else (16, triton.next_power_of_2(min(each, 32)))
    steps = 8 if shared else 1
    grid = (triton.cdiv(rows, block * steps), triton.cdiv(units, block))
    block_inner = min(64, max(16, triton.next_power_of_2(width)))
    return grid, (
        rows, units, each, width, shared, bias is not None, product_type(x.dtype), steps,
        block, block, block_each, block_inner,
    )  # fmt: skip


def _triton_forward(x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor]:
    x, hidden, weight = x.contiguous(), hidden.contiguous(), weight.contiguous()
    out = x.new_empty(x.shape)
    if x.numel():
        grid, sizes = _plan(x, hidden, weight, bias)
        _gate[grid](x, hidden, weight, x if bias is None else bias.contiguous(), out, *sizes)
    return (out,)


def _triton_backward(
    gradient: Tensor, x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor | None, ...]:
    gradient, x, hidden, weight = gradient.contiguous(), x.contiguous(), hidden.contiguous(), weight.contiguous()
    of_x, units = torch.empty_like(x), x.shape[1]
    shared = len(hidden) == 1
    grid, sizes = _plan(x, hidden, weight, bias)
    # A shared context gets one row of sums from each program along the batch, added up in their order.
    of_logits = x.new_empty(grid[0], units, dtype=torch.float32) if shared else x.new_empty(len(x), units)
    if x.numel():
        _gate_backward[grid](
            gradient, x, hidden, weight, x if bias is None else bias.contiguous(), of_x, of_logits, *sizes
        )
    else:
        of_logits.zero_()
    if shared:
        of_logits = of_logits.sum(0, keepdim=True).to(x.dtype)
    return of_x, *_product_backward(of_logits, hidden, weight, bias)


def _product_backward(
    of_logits: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Return the gradients of hidden, weight and bias from those of the logits, (B or 1, D or F)."""
    of_bias = None if bias is None else of_logits.sum(0)
    return product(of_logits, weight.T), summed_product(of_logits, hidden), of_bias


def _cpu_forward(x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    mask = product(hidden, weight, bias).sigmoid_().mul_(2)
    return x * (mask.unsqueeze(2) if x.dim() == 3 else mask), mask


def _cpu_backward(
    gradient: Tensor, x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor
) -> tuple[Tensor | None, ...]:
    if x.dim() == 3:
        of_x, of_logits = gradient * mask.unsqueeze(2), (gradient * x).sum(2).mul_(mask)
    else:
        of_x = gradient * mask
        of_logits = of_x * x
    if len(hidden) == 1:
        of_logits = of_logits.sum(0, keepdim=True)
    of_logits.addcmul_(of_logits, mask, value=-0.5)
    return of_x, *_product_backward(of_logits, hidden, weight, bias)


def _fits(x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether all are of one floating type, and x is (B, D) or (B, F, d) for hidden (B or 1, H)."""
    return (
        x.dim() in (2, 3)
        and hidden.dim() == 2
        and hidden.shape[0] in (1, x.shape[0])
        and weight.shape == (x.shape[1], hidden.shape[1])
        and x.dtype == hidden.dtype == weight.dtype
        and (bias is None or (bias.shape == weight.shape[:1] and bias.dtype == x.dtype))
    )


def _triton_allows(x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return x.dtype in (torch.float32, torch.bfloat16, torch.float16) and _fits(x, hidden, weight, bias)


def _cpu_allows(x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return x.dtype in (torch.float32, torch.float64) and _fits(x, hidden, weight, bias)


def _cpu_worth(_x: Tensor, hidden: Tensor, weight: Tensor, _bias: Tensor | None) -> bool:
    return len(hidden) * weight.numel() >= 2**22  # of a shared context the definition multiplies one row too


def _outputs(x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor]:
    return (x.new_empty(x.shape),)


def _example(
    generator: torch.Generator, device: str, dtype: torch.dtype,
    *, rows: int, units: int, each: int = 1, hidden: int = 64, shared: int = 0,
) -> tuple[Tensor, ...]:  # fmt: skip
    def draw(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*size, generator=generator) * scale).to(device, dtype)

    return (
        draw(rows, units) if each == 1 else draw(rows, units, each),
        draw(1 if shared else rows, hidden),
        draw(units, hidden, scale=hidden**-0.5),
        draw(units),
    )


def _moved(x: Tensor, *others: Tensor) -> int:
    return (2 * x.numel() + sum(t.numel() for t in others)) * x.element_size()


def _computed(x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor) -> int:
    return 2 * len(hidden) * weight.numel() + x.numel()


OPERATOR = Operator(
    "feature_gate",
    reference,
    "Tensor x, Tensor hidden, Tensor weight, Tensor? bias",
    (
        Implementation("triton", "cuda", _triton_allows, _triton_forward, _triton_backward, _outputs),
        Implementation("cpu", "cpu", _cpu_allows, _cpu_forward, _cpu_backward, worth=_cpu_worth),
    ),
    Workload(
        _example,
        (
            *({"rows": rows, "units": 624, "shared": own} for rows in (1, 512, 4096, 16384) for own in (0, 1)),
            *({"rows": rows, "units": 39, "each": 16} for rows in (4096, 16384)),
        ),
        _moved,
        _computed,
    ),
)
