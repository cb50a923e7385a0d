"""The gated cross layer: both its products over one read of the input, and all that follows them."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from kernels.dispatch import Implementation, Operator, Workload, product_type
from kernels.product import product, summed_product


def gated_cross(
    c0: Tensor,
    c: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    *,
    fused: bool = True,
) -> Tensor:
    """Return c0 * (W c + b) * sigmoid(G c) + c.

    Without a gate this is the cross layer of DCN-V2.

    Args:
        c0: input of the whole cross network, (B, D).
        c: input of this layer, (B, D).
        weight: W, (D, D).
        bias: b, (D,); None stands for 0.
        gate: G, (D, D); None stands for a gate of 1 and costs nothing.
        fused: False computes the definition.

    Returns:
        (B, D).

    Example:
        >>> c0, c, two = torch.tensor([[2.0]]), torch.tensor([[1.0]]), torch.tensor([[3.0]])
        >>> gated_cross(c0, c, two), gated_cross(c0, c, two, gate=torch.tensor([[0.0]]))
        (tensor([[7.]]), tensor([[4.]]))

    Source: GDCN, arXiv 2311.04635; DCN-V2, arXiv 2008.13535.
    """
    return OPERATOR(c0, c, weight, bias, gate, fused=fused)


def reference(c0: Tensor, c: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor | None) -> Tensor:
    """The definition, in plain torch."""
    crossed = F.linear(c, weight, bias)  # (B, D)
    return torch.addcmul(c, c0, crossed if gate is None else crossed * torch.sigmoid(F.linear(c, gate)))


@triton.jit
def _layer(
    c0, c, weight, bias, gate, out, crossed_out, mask_out, rows, width: tl.constexpr,
    gated: tl.constexpr, biased: tl.constexpr, product: tl.constexpr,
    block_rows: tl.constexpr, block_width: tl.constexpr, block_inner: tl.constexpr,
):  # fmt: skip
    """One tile of the layer's output: two accumulators over one walk along c, then the rest in registers."""
    row = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    column = tl.program_id(1) * block_width + tl.arange(0, block_width)
    inner = tl.arange(0, block_inner)
    crossed = tl.zeros((block_rows, block_width), tl.float32)
    asked = tl.zeros((block_rows, block_width), tl.float32)
    for start in range(0, width, block_inner):
        k = start + inner
        read = (row[:, None] < rows) & (k[None, :] < width)
        of_weight = (column[None, :] < width) & (k[:, None] < width)
        tile = tl.load(c + row[:, None].to(tl.int64) * width + k[None, :], mask=read, other=0.0)
        w = tl.load(weight + column[None, :] * width + k[:, None], mask=of_weight, other=0.0)
        crossed = tl.dot(tile.to(product), w.to(product), crossed, input_precision="ieee")
        if gated:
            g = tl.load(gate + column[None, :] * width + k[:, None], mask=of_weight, other=0.0)
            asked = tl.dot(tile.to(product), g.to(product), asked, input_precision="ieee")
    own = (row[:, None] < rows) & (column[None, :] < width)
    place = row[:, None].to(tl.int64) * width + column[None, :]
    if biased:
        crossed += tl.load(bias + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
    first = tl.load(c0 + place, mask=own, other=0.0).to(tl.float32)
    before = tl.load(c + place, mask=own, other=0.0).to(tl.float32)
    tl.store(crossed_out + place, crossed, mask=own)
    if gated:
        mask = tl.sigmoid(asked)
        tl.store(mask_out + place, mask, mask=own)
        crossed *= mask
    tl.store(out + place, first * crossed + before, mask=own)


@triton.jit
def _layer_backward(
    gradient, c0, crossed, mask, c0_out, both_out, size, width: tl.constexpr,
    gated: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Elementwise: the gradients of c0, of W c + b and of G c, the last two side by side in rows of 2 D."""
    place = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    own = place < size
    row, column = place // width, place % width
    d = tl.load(gradient + place, mask=own, other=0.0).to(tl.float32)
    first = tl.load(c0 + place, mask=own, other=0.0).to(tl.float32)
    x = tl.load(crossed + place, mask=own, other=0.0).to(tl.float32)
    if gated:
        m = tl.load(mask + place, mask=own, other=0.0).to(tl.float32)
        tl.store(c0_out + place, d * x * m, mask=own)
        tl.store(both_out + row * 2 * width + column, d * first * m, mask=own)
        tl.store(both_out + row * 2 * width + width + column, d * first * x * m * (1 - m), mask=own)
    else:
        tl.store(c0_out + place, d * x, mask=own)
        tl.store(both_out + place, d * first, mask=own)


def _triton_forward(
    c0: Tensor, c: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    c0, c, weight = c0.contiguous(), c.contiguous(), weight.contiguous()
    rows, width = c.shape
    out, crossed = torch.empty_like(c), torch.empty_like(c, dtype=torch.float32)
    mask = torch.empty_like(crossed) if gate is not None else crossed.new_empty(0)
    block_rows, block_width, block_inner = 64, 64, 32
    if rows:
        _layer[(triton.cdiv(rows, block_rows), triton.cdiv(width, block_width))](
            c0, c, weight, c if bias is None else bias.contiguous(), c if gate is None else gate.contiguous(),
            out, crossed, mask, rows, width, gate is not None, bias is not None, product_type(c.dtype),
            block_rows, block_width, block_inner, num_warps=4, num_stages=3,
        )  # fmt: skip
    return out, crossed, mask


def _triton_backward(
    gradient: Tensor, c0: Tensor, c: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor | None,
    crossed: Tensor, mask: Tensor,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    gradient, c0 = gradient.contiguous(), c0.contiguous()
    rows, width = c.shape
    of_c0 = torch.empty_like(c0)
    both = c.new_empty(rows, width * (2 if gate is not None else 1))  # (B, 2 D)
    if rows:
        _layer_backward[(triton.cdiv(c.numel(), 1024),)](
            gradient, c0, crossed, mask, of_c0, both, c.numel(), width, gate is not None, 1024
        )
    return _products_backward(gradient, of_c0, both, c, weight, bias, gate)


def _products_backward(
    gradient: Tensor, of_c0: Tensor, both: Tensor, c: Tensor, weight: Tensor, bias: Tensor | None,
    gate: Tensor | None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Return all gradients, from those of c0 and of both products."""
    width = c.shape[1]
    weights = weight if gate is None else torch.cat((weight, gate))  # (2 D, D)
    of_c = product(both, weights.T).add_(gradient)
    of_weights = summed_product(both, c)  # (D or 2 D, D)
    of_bias = None if bias is None else both[:, :width].sum(0)
    if gate is None:
        return of_c0, of_c, of_weights, of_bias, None
    of_weight, of_gate = of_weights.chunk(2)
    return of_c0, of_c, of_weight.clone(), of_bias, of_gate.clone()  # an operator may not return two views of one


def _cpu_forward(
    c0: Tensor, c: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    crossed = product(c, weight, bias)
    if gate is None:
        return torch.addcmul(c, c0, crossed), crossed, c.new_empty(0)
    mask = product(c, gate).sigmoid_()
    out = crossed * mask
    return torch.addcmul(c, c0, out, out=out), crossed, mask


def _cpu_backward(
    gradient: Tensor, c0: Tensor, c: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor | None,
    crossed: Tensor, mask: Tensor,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    width = c.shape[1]
    if gate is None:
        return _products_backward(gradient, gradient * crossed, gradient * c0, c, weight, bias, gate)
    both = c.new_empty(len(c), 2 * width)
    of_crossed, of_asked = both[:, :width], both[:, width:]
    passed = gradient * mask
    torch.mul(passed, c0, out=of_crossed)
    of_c0 = passed.mul_(crossed)
    torch.mul(of_crossed, crossed, out=of_asked)
    of_asked.addcmul_(of_asked, mask, value=-1)
    return _products_backward(gradient, of_c0, both, c, weight, bias, gate)


def _fits(c0: Tensor, c: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor | None) -> bool:
    """Whether all are of one floating type, and of the shapes that the function names."""
    width = c.shape[-1]
    return (
        c.dim() == 2
        and c0.shape == c.shape
        and weight.shape == (width, width)
        and (bias is None or bias.shape == (width,))
        and (gate is None or gate.shape == weight.shape)
        and all(t is None or t.dtype == c.dtype for t in (c0, weight, bias, gate))
    )


def _triton_allows(c0: Tensor, c: Tensor, *others: Any) -> bool:
    return c.dtype in (torch.float32, torch.bfloat16, torch.float16) and _fits(c0, c, *others)


def _cpu_allows(c0: Tensor, c: Tensor, *others: Any) -> bool:
    return c.dtype in (torch.float32, torch.float64) and _fits(c0, c, *others)


def _outputs(
    c0: Tensor, c: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    kept = c.new_empty(c.shape, dtype=torch.float32)
    return c.new_empty(c.shape), kept, torch.empty_like(kept) if gate is not None else kept.new_empty(0)


def _example(
    generator: torch.Generator, device: str, dtype: torch.dtype, *, rows: int, width: int
) -> tuple[Tensor, ...]:
    def draw(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*size, generator=generator) * scale).to(device, dtype)

    square = width**-0.5
    return (
        draw(rows, width),
        draw(rows, width),
        draw(width, width, scale=square),
        draw(width),
        draw(width, width, scale=square),
    )


def _moved(c0: Tensor, c: Tensor, *weights: Tensor) -> int:
    return (3 * c.numel() + sum(w.numel() for w in weights)) * c.element_size()


def _computed(c0: Tensor, c: Tensor, *weights: Tensor) -> int:
    return 4 * c.numel() * c.shape[1]


OPERATOR = Operator(
    "gated_cross",
    reference,
    "Tensor c0, Tensor c, Tensor weight, Tensor? bias, Tensor? gate",
    (
        Implementation("triton", "cuda", _triton_allows, _triton_forward, _triton_backward, _outputs, returns=3),
        Implementation("cpu", "cpu", _cpu_allows, _cpu_forward, _cpu_backward),
    ),
    Workload(
        _example,
        tuple({"rows": rows, "width": width} for rows in (1, 512, 4096, 16384) for width in (160, 624)),
        _moved,
        _computed,
    ),
)
