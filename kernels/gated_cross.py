"""The gated cross layer: both its products over one read of the input, and all that follows them.

For large D the products are torch's, and all that follows them is one pass over memory.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from kernels.dispatch import Implementation, Operator, Workload, product_type
from kernels.product import WORTH, product, summed_product

WIDE = 512
"""The largest D of which one kernel computes the products too.

Its tile of 64 by 64 holds two accumulators, reads three tiles a step along c and so makes 85 operations of each
number that it reads; the library's tile of 128 by 256 makes 171. Taken to be half as fast for that, it loses 4 n D
operations to the library's rate R, n = B D, and saves 4 n numbers of s bytes at the bandwidth V: both products,
written and read. The two are equal at D = s R / V, which is 591 in bfloat16 by an H100's data sheet (989 Tflop/s,
3.35 TB/s). A first guess, not measured on a GPU.
"""


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
    c0, c, weight, bias, gate, out, both_out, rows, width: tl.constexpr,
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
    first = tl.load(c0 + place, mask=own, other=0.0).to(tl.float32)
    before = tl.load(c + place, mask=own, other=0.0).to(tl.float32)
    if gated:
        pair = row[:, None].to(tl.int64) * 2 * width + column[None, :]
        tl.store(both_out + pair, crossed, mask=own)
        tl.store(both_out + pair + width, asked, mask=own)
    else:
        tl.store(both_out + place, crossed, mask=own)
    if biased:
        crossed += tl.load(bias + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
    if gated:
        crossed *= tl.sigmoid(asked)
    tl.store(out + place, first * crossed + before, mask=own)


@triton.jit
def _epilogue(
    c0, c, both, bias, out, size, width: tl.constexpr, gated: tl.constexpr, biased: tl.constexpr,
    block: tl.constexpr,
):  # fmt: skip
    """Elementwise: the layer's output from both products, which are side by side in rows of 2 D."""
    place = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    own = place < size
    row, column = place // width, place % width
    first = tl.load(c0 + place, mask=own, other=0.0).to(tl.float32)
    before = tl.load(c + place, mask=own, other=0.0).to(tl.float32)
    pair = row * (2 * width if gated else width) + column
    crossed = tl.load(both + pair, mask=own, other=0.0).to(tl.float32)
    if biased:
        crossed += tl.load(bias + column, mask=own, other=0.0).to(tl.float32)
    if gated:
        crossed *= tl.sigmoid(tl.load(both + pair + width, mask=own, other=0.0).to(tl.float32))
    tl.store(out + place, first * crossed + before, mask=own)


@triton.jit
def _epilogue_backward(
    gradient, c0, both, bias, c0_out, both_out, size, width: tl.constexpr, gated: tl.constexpr,
    biased: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Elementwise: the gradients of c0 and of both products, the latter side by side as the products are."""
    place = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    own = place < size
    row, column = place // width, place % width
    d = tl.load(gradient + place, mask=own, other=0.0).to(tl.float32)
    first = tl.load(c0 + place, mask=own, other=0.0).to(tl.float32)
    pair = row * (2 * width if gated else width) + column
    x = tl.load(both + pair, mask=own, other=0.0).to(tl.float32)
    if biased:
        x += tl.load(bias + column, mask=own, other=0.0).to(tl.float32)
    if gated:
        m = tl.sigmoid(tl.load(both + pair + width, mask=own, other=0.0).to(tl.float32))
        tl.store(c0_out + place, d * x * m, mask=own)
        tl.store(both_out + pair, d * first * m, mask=own)
        tl.store(both_out + pair + width, d * first * x * m * (1 - m), mask=own)
    else:
        tl.store(c0_out + place, d * x, mask=own)
        tl.store(both_out + pair, d * first, mask=own)


def _triton_forward(
    c0: Tensor, c: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor | None
) -> tuple[Tensor, Tensor]:
    c0, c, weight = c0.contiguous(), c.contiguous(), weight.contiguous()
    (rows, width), products = c.shape, 1 if gate is None else 2
    out, both = torch.empty_like(c), c.new_empty(rows, products * width, dtype=torch.float32)
    block_rows, block_width, block_inner = 64, 64, 32
    if rows:
        _layer[(triton.cdiv(rows, block_rows), triton.cdiv(width, block_width))](
            c0, c, weight, c if bias is None else bias.contiguous(), c if gate is None else gate.contiguous(),
            out, both, rows, width, gate is not None, bias is not None, product_type(c.dtype),
            block_rows, block_width, block_inner, num_warps=4, num_stages=3,
        )  # fmt: skip
    return out, both


def both_products(c: Tensor, weight: Tensor, gate: Tensor | None) -> Tensor:
    """Return W c and G c side by side, (B, 2 D), by torch's products; without a gate W c alone, (B, D).

    W and G stacked make one product, which reads c once: n numbers less. To stack them, 2 D D numbers are read and
    written: worth it from B = 4 D on.

    Example:
        >>> c, one = torch.tensor([[1.0, 2.0]]), torch.eye(2)
        >>> both_products(c, one, 3 * one)
        tensor([[1., 2., 3., 6.]])
    """
    if gate is None:
        return product(c, weight)
    rows, width = c.shape
    if rows >= 4 * width:
        return product(c, torch.cat((weight, gate)))
    both = c.new_empty(rows, 2 * width)
    torch.mm(c, weight.T, out=both[:, :width])
    torch.mm(c, gate.T, out=both[:, width:])
    return both


def _epilogue_forward(
    c0: Tensor, c: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor | None
) -> tuple[Tensor, Tensor]:
    c0, c = c0.contiguous(), c.contiguous()
    out, both = torch.empty_like(c), both_products(c, weight, gate)
    if len(c):
        _epilogue[(triton.cdiv(c.numel(), 1024),)](
            c0, c, both, c if bias is None else bias.contiguous(), out, c.numel(), c.shape[1],
            gate is not None, bias is not None, 1024,
        )  # fmt: skip
    return out, both


def triton_backward(
    gradient: Tensor, c0: Tensor, c: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor | None, both: Tensor
) -> tuple[Tensor | None, ...]:
    """Return the gradients of all arguments, from that of the layer's output and from :func:`both_products`."""
    gradient, c0 = gradient.contiguous(), c0.contiguous()
    of_c0, of_both = torch.empty_like(c0), c.new_empty(both.shape)
    if len(c):
        _epilogue_backward[(triton.cdiv(c.numel(), 1024),)](
            gradient, c0, both, c0 if bias is None else bias.contiguous(), of_c0, of_both, c.numel(), c.shape[1],
            gate is not None, bias is not None, 1024,
        )  # fmt: skip
    return _products_backward(gradient, of_c0, of_both, c, weight, bias, gate)


def _products_backward(
    gradient: Tensor, of_c0: Tensor, both: Tensor, c: Tensor, weight: Tensor, bias: Tensor | None,
    gate: Tensor | None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Return all gradients, from those of c0 and of both products."""
    rows, width = c.shape
    of_bias = None if bias is None else both[:, :width].sum(0)
    if gate is None:
        return of_c0, product(both, weight.T).add_(gradient), summed_product(both, c), of_bias, None
    if rows >= 2 * width:  # one product saves more than it costs to stack W and G, and to part their gradients
        of_c = product(both, torch.cat((weight, gate)).T).add_(gradient)
        of_weight, of_gate = summed_product(both, c).chunk(2)
        # An operator may not return two views of one.
        return of_c0, of_c, of_weight.clone(), of_bias, of_gate.clone()
    of_crossed, of_asked = both.chunk(2, dim=1)
    of_c = product(of_crossed, weight.T).add_(gradient).add_(product(of_asked, gate.T))
    return of_c0, of_c, summed_product(of_crossed, c), of_bias, summed_product(of_asked, c)


def cpu_forward(
    c0: Tensor, c: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    crossed = product(c, weight, bias)
    if gate is None:
        return torch.addcmul(c, c0, crossed), crossed, c.new_empty(0)
    mask = product(c, gate).sigmoid_()
    out = crossed * mask
    return torch.addcmul(c, c0, out, out=out), crossed, mask


def cpu_backward(
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
    return c.shape[-1] <= WIDE and _epilogue_allows(c0, c, *others)


def _epilogue_allows(c0: Tensor, c: Tensor, *others: Any) -> bool:
    return c.dtype in (torch.float32, torch.bfloat16, torch.float16) and _fits(c0, c, *others)


def _cpu_allows(c0: Tensor, c: Tensor, *others: Any) -> bool:
    return c.dtype in (torch.float32, torch.float64) and _fits(c0, c, *others)


def _cpu_worth(_c0: Tensor, c: Tensor, *_others: Any) -> bool:
    return c.numel() * c.shape[1] >= WORTH


def _triton_outputs(
    c0: Tensor, c: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor | None
) -> tuple[Tensor, Tensor]:
    out, both = _epilogue_outputs(c0, c, weight, bias, gate)
    return out, both.float()


def _epilogue_outputs(
    c0: Tensor, c: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor | None
) -> tuple[Tensor, Tensor]:
    rows, width = c.shape
    return c.new_empty(rows, width), c.new_empty(rows, width * (1 if gate is None else 2))


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
        Implementation(
            "triton", "cuda", _triton_allows, _triton_forward, triton_backward, _triton_outputs, returns=2
        ),
        Implementation(
            "epilogue", "cuda", _epilogue_allows, _epilogue_forward, triton_backward, _epilogue_outputs, returns=2
        ),
        Implementation("cpu", "cpu", _cpu_allows, cpu_forward, cpu_backward, worth=_cpu_worth),
    ),
    Workload(
        _example,
        tuple({"rows": rows, "width": width} for rows in (1, 512, 4096, 16384) for width in (160, 512, 624)),
        _moved,
        _computed,
    ),
)
