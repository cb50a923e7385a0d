"""Multi-head bilinear fusion of two streams into one number a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from kernels.dispatch import Implementation, Operator, Workload, product_type
from kernels.product import product, summed_product

GROUP = 1024
"""Rows over which one program sums the gradient of W; the sums of all groups are added up in their order."""


def bilinear_fusion(
    o1: Tensor, o2: Tensor, weight: Tensor, w1: Tensor, w2: Tensor, bias: Tensor, *, fused: bool = True
) -> Tensor:
    """Return bias + w1 . o1 + w2 . o2 + sum_h o1_h' W_h o2_h, one number a row.

    o1 and o2 are cut into k contiguous heads. Nothing of size (B, d1/k, d2/k) ever exists.

    Args:
        o1: first stream, (B, d1).
        o2: second stream, (B, d2).
        weight: one matrix a head, (k, d1/k, d2/k).
        w1: (d1,).
        w2: (d2,).
        bias: scalar, shape ().
        fused: False computes the definition.

    Returns:
        (B,).

    Example:
        >>> o1, o2 = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]])
        >>> zero = torch.zeros(2)
        >>> bilinear_fusion(o1, o2, torch.ones(2, 1, 1), zero, zero, torch.tensor(0.5))  # 1*3 + 2*4 + 0.5
        tensor([11.5000])
        >>> bilinear_fusion(o1, o2, torch.ones(1, 2, 2), zero, zero, torch.tensor(0.5))  # (1+2)*(3+4) + 0.5
        tensor([21.5000])

    Source: FinalMLP, arXiv 2304.00902.
    """
    return OPERATOR(o1, o2, weight, w1, w2, bias, fused=fused)


def reference(o1: Tensor, o2: Tensor, weight: Tensor, w1: Tensor, w2: Tensor, bias: Tensor) -> Tensor:
    """The definition, in plain torch."""
    heads, d1, d2 = weight.shape
    left = o1.reshape(-1, heads, d1).transpose(0, 1)  # (k, B, d1/k), a view
    projected = torch.bmm(left, weight).transpose(0, 1).reshape(-1, heads * d2)  # (B, d2)
    # w1 . o1 is a product of its own (by linear, which autocast knows); w2 joins the reduction over o2, which is
    # needed anyway.
    return F.linear(o1, w1.unsqueeze(0)).squeeze(1) + ((projected + w2) * o2).sum(1) + bias


@triton.jit
def _fuse(
    o1, o2, weight, w1, w2, bias, out, rows, heads: tl.constexpr, d1: tl.constexpr, d2: tl.constexpr,
    product: tl.constexpr, block_rows: tl.constexpr, block1: tl.constexpr, block2: tl.constexpr,
):  # fmt: skip
    """Some rows, all heads: a tile of o1_h' W_h lives in registers until it meets o2_h. d1, d2 are a head's."""
    row = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    own = row < rows
    first = o1 + row[:, None].to(tl.int64) * (heads * d1)
    second = o2 + row[:, None].to(tl.int64) * (heads * d2)
    total = tl.zeros((block_rows,), tl.float32)
    for start in range(0, heads * d1, block1):
        i = start + tl.arange(0, block1)
        left = tl.load(first + i[None, :], mask=own[:, None] & (i[None, :] < heads * d1), other=0.0)
        linear = tl.load(w1 + i, mask=i < heads * d1, other=0.0).to(tl.float32)
        total += tl.sum(left.to(tl.float32) * linear[None, :], axis=1)
    for head in range(heads):
        for start2 in range(0, d2, block2):
            j = start2 + tl.arange(0, block2)
            projected = tl.zeros((block_rows, block2), tl.float32)
            for start1 in range(0, d1, block1):
                i = start1 + tl.arange(0, block1)
                left = tl.load(first + head * d1 + i[None, :], mask=own[:, None] & (i[None, :] < d1), other=0.0)
                within = (i[:, None] < d1) & (j[None, :] < d2)
                w = tl.load(weight + (head * d1 + i[:, None]) * d2 + j[None, :], mask=within, other=0.0)
                projected = tl.dot(left.to(product), w.to(product), projected, input_precision="ieee")
            linear = tl.load(w2 + head * d2 + j, mask=j < d2, other=0.0).to(tl.float32)
            right = tl.load(second + head * d2 + j[None, :], mask=own[:, None] & (j[None, :] < d2), other=0.0)
            total += tl.sum((projected + linear[None, :]) * right.to(tl.float32), axis=1)
    tl.store(out + row, total + tl.load(bias).to(tl.float32), mask=own)


@triton.jit
def _stream_backward(
    gradient, other, weight, linear, out, rows, heads: tl.constexpr, inner: tl.constexpr, outer: tl.constexpr,
    step_inner: tl.constexpr, step_outer: tl.constexpr, product: tl.constexpr,
    block_rows: tl.constexpr, block_inner: tl.constexpr, block_outer: tl.constexpr,
):  # fmt: skip
    """A tile of one stream's gradient, gradient * (other W + w); the steps say which way W is read."""
    row = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    tiles = tl.cdiv(outer, block_outer)
    head = tl.program_id(1) // tiles
    o = tl.program_id(1) % tiles * block_outer + tl.arange(0, block_outer)
    own = row < rows
    projected = tl.zeros((block_rows, block_outer), tl.float32)
    for start in range(0, inner, block_inner):
        i = start + tl.arange(0, block_inner)
        at = row[:, None].to(tl.int64) * (heads * inner) + head * inner + i[None, :]
        tile = tl.load(other + at, mask=own[:, None] & (i[None, :] < inner), other=0.0)
        within = (i[:, None] < inner) & (o[None, :] < outer)
        place = head * inner * outer + i[:, None] * step_inner + o[None, :] * step_outer
        w = tl.load(weight + place, mask=within, other=0.0)
        projected = tl.dot(tile.to(product), w.to(product), projected, input_precision="ieee")
    projected += tl.load(linear + head * outer + o, mask=o < outer, other=0.0).to(tl.float32)[None, :]
    d = tl.load(gradient + row, mask=own, other=0.0).to(tl.float32)
    at = row[:, None].to(tl.int64) * (heads * outer) + head * outer + o[None, :]
    tl.store(out + at, d[:, None] * projected, mask=own[:, None] & (o[None, :] < outer))


@triton.jit
def _weight_backward(
    gradient, o1, o2, weight_out, w1_out, w2_out, rows, group: tl.constexpr,
    heads: tl.constexpr, d1: tl.constexpr, d2: tl.constexpr,
    product: tl.constexpr, block_rows: tl.constexpr, block1: tl.constexpr, block2: tl.constexpr,
):  # fmt: skip
    """A tile of one head's W: the sum over one group of rows, and with it those of w1 and w2."""
    tiles2 = tl.cdiv(d2, block2)
    part, head = tl.program_id(0), tl.program_id(2)
    tile1, tile2 = tl.program_id(1) // tiles2, tl.program_id(1) % tiles2
    i, j = tile1 * block1 + tl.arange(0, block1), tile2 * block2 + tl.arange(0, block2)
    found = tl.zeros((block1, block2), tl.float32)
    linear1, linear2 = tl.zeros((block1,), tl.float32), tl.zeros((block2,), tl.float32)
    for start in range(0, group, block_rows):
        row = part * group + start + tl.arange(0, block_rows)
        own = row < rows
        d = tl.load(gradient + row, mask=own, other=0.0).to(tl.float32)
        at1 = row[:, None].to(tl.int64) * (heads * d1) + head * d1 + i[None, :]
        at2 = row[:, None].to(tl.int64) * (heads * d2) + head * d2 + j[None, :]
        left = tl.load(o1 + at1, mask=own[:, None] & (i[None, :] < d1), other=0.0).to(tl.float32)
        right = tl.load(o2 + at2, mask=own[:, None] & (j[None, :] < d2), other=0.0).to(tl.float32) * d[:, None]
        linear1 += tl.sum(left * d[:, None], axis=0)
        linear2 += tl.sum(right, axis=0)
        found = tl.dot(tl.trans(left).to(product), right.to(product), found, input_precision="ieee")
    place = ((part * heads + head) * d1 + i[:, None]).to(tl.int64) * d2 + j[None, :]
    tl.store(weight_out + place, found, mask=(i[:, None] < d1) & (j[None, :] < d2))
    tl.store(w1_out + (part * heads + head) * d1 + i, linear1, mask=(i < d1) & (tile2 == 0))
    tl.store(w2_out + (part * heads + head) * d2 + j, linear2, mask=(j < d2) & (tile1 == 0))


def _block(size: int) -> int:
    return min(64, max(16, triton.next_power_of_2(size)))


def _triton_forward(o1: Tensor, o2: Tensor, weight: Tensor, w1: Tensor, w2: Tensor, bias: Tensor) -> tuple[Tensor]:
    o1, o2, weight = o1.contiguous(), o2.contiguous(), weight.contiguous()
    rows, (heads, d1, d2) = len(o1), weight.shape
    out = o1.new_empty(rows)
    block_rows = 64 if rows >= 8192 else 16  # enough programs for a small batch
    if rows:
        _fuse[(triton.cdiv(rows, block_rows),)](
            o1, o2, weight, w1.contiguous(), w2.contiguous(), bias, out, rows, heads, d1, d2,
            product_type(o1.dtype), block_rows, _block(d1), _block(d2),
        )  # fmt: skip
    return (out,)


def _triton_backward(
    gradient: Tensor, o1: Tensor, o2: Tensor, weight: Tensor, w1: Tensor, w2: Tensor, bias: Tensor
) -> tuple[Tensor | None, ...]:
    gradient, o1, o2, weight = gradient.contiguous(), o1.contiguous(), o2.contiguous(), weight.contiguous()
    rows, (heads, d1, d2) = len(o1), weight.shape
    groups, product = triton.cdiv(rows, GROUP), product_type(o1.dtype)
    of_o1, of_o2 = torch.empty_like(o1), torch.empty_like(o2)
    of_weight = weight.new_empty(groups, *weight.shape, dtype=torch.float32)
    of_w1, of_w2 = of_weight.new_empty(groups, heads * d1), of_weight.new_empty(groups, heads * d2)
    if rows:
        block1, block2 = _block(d1), _block(d2)
        tiles1, tiles2 = triton.cdiv(d1, block1), triton.cdiv(d2, block2)
        blocks = triton.cdiv(rows, 64)
        _stream_backward[(blocks, heads * tiles2)](
            gradient, o1, weight, w2.contiguous(), of_o2, rows, heads, d1, d2, d2, 1, product, 64, block1, block2
        )
        _stream_backward[(blocks, heads * tiles1)](
            gradient, o2, weight, w1.contiguous(), of_o1, rows, heads, d2, d1, 1, d2, product, 64, block2, block1
        )
        _weight_backward[(groups, tiles1 * tiles2, heads)](
            gradient, o1, o2, of_weight, of_w1, of_w2, rows, GROUP, heads, d1, d2, product, 64, block1, block2
        )
    return (of_o1, of_o2, *(t.sum(0).to(o1.dtype) for t in (of_weight, of_w1, of_w2)), gradient.sum())


def _by_head(stream: Tensor, heads: int) -> Tensor:
    """Return (B, d) as (k, B, d/k), a view."""
    return stream.view(len(stream), heads, stream.shape[1] // heads).transpose(0, 1)


def _times_heads(stream: Tensor, weight: Tensor) -> Tensor:
    """Return each head of (B, d) times its own matrix of (k, d/k, e/k), side by side, (B, e), on CPU."""
    heads = len(weight)
    if _wide(weight):
        return torch.cat([product(x, w.T) for x, w in zip(stream.chunk(heads, 1), weight, strict=True)], dim=1)
    out = stream.new_empty(len(stream), heads * weight.shape[2])
    torch.bmm(_by_head(stream, heads), weight, out=_by_head(out, heads))
    return out


def _wide(weight: Tensor) -> bool:
    """Whether heads are so wide that a product of each is faster than one of all."""
    return min(weight.shape[1:]) >= 100


def _cpu_forward(
    o1: Tensor, o2: Tensor, weight: Tensor, w1: Tensor, w2: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    projected = _times_heads(o1, weight)
    projected += w2
    out = torch.addmv(bias.expand(len(o1)), o1, w1)
    return out.add_((projected * o2).sum(1)), projected


def _cpu_backward(
    gradient: Tensor, o1: Tensor, o2: Tensor, weight: Tensor, w1: Tensor, w2: Tensor, bias: Tensor,
    projected: Tensor,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    heads, column = len(weight), gradient.unsqueeze(1)
    weighed = o2 * column
    of_o1 = _times_heads(weighed, weight.mT).addcmul_(column, w1)
    if heads == 1 or _wide(weight):
        pairs = zip(o1.chunk(heads, 1), weighed.chunk(heads, 1), strict=True)
        of_weight = torch.stack([summed_product(left, right) for left, right in pairs])
    else:
        of_weight = torch.bmm(_by_head(o1, heads).mT, _by_head(weighed, heads))
    of_w1 = summed_product(column, o1).squeeze(0)
    return of_o1, projected * column, of_weight, of_w1, weighed.sum(0), gradient.sum()


def _fits(o1: Tensor, o2: Tensor, weight: Tensor, w1: Tensor, w2: Tensor, bias: Tensor) -> bool:
    """Whether all are of one floating type, and the heads make up both streams."""
    if weight.dim() != 3:
        return False
    heads, d1, d2 = weight.shape
    return (
        o1.dim() == 2
        and o1.shape[1] == heads * d1
        and o2.shape == (len(o1), heads * d2)
        and w1.shape == o1.shape[1:]
        and w2.shape == o2.shape[1:]
        and bias.dim() == 0
        and o1.dtype == o2.dtype == weight.dtype == w1.dtype == w2.dtype == bias.dtype
    )


def _triton_allows(o1: Tensor, *others: Tensor) -> bool:
    return o1.dtype in (torch.float32, torch.bfloat16, torch.float16) and _fits(o1, *others)


def _cpu_allows(o1: Tensor, o2: Tensor, *others: Tensor) -> bool:
    # A view of a wider tensor can't be cut into heads without a copy.
    return (
        o1.dtype in (torch.float32, torch.float64)
        and o1.is_contiguous()
        and o2.is_contiguous()
        and _fits(o1, o2, *others)
    )


def _cpu_worth(o1: Tensor, _o2: Tensor, weight: Tensor, *_rest: Tensor) -> bool:
    return len(o1) * weight.numel() >= 2**23


def _outputs(o1: Tensor, *others: Tensor) -> tuple[Tensor]:
    return (o1.new_empty(len(o1)),)


def _example(
    generator: torch.Generator, device: str, dtype: torch.dtype, *, rows: int, heads: int, d1: int, d2: int
) -> tuple[Tensor, ...]:
    def draw(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(size, generator=generator) * scale).to(device, dtype)

    return (
        draw(rows, d1),
        draw(rows, d2),
        draw(heads, d1 // heads, d2 // heads, scale=(d1 * d2 / heads) ** -0.5),
        draw(d1, scale=d1**-0.5),
        draw(d2, scale=d2**-0.5),
        draw(),
    )


def _moved(*arguments: Tensor) -> int:
    return (sum(t.numel() for t in arguments) + len(arguments[0])) * arguments[0].element_size()


def _computed(o1: Tensor, o2: Tensor, weight: Tensor, *others: Tensor) -> int:
    return 2 * (len(o1) * weight.numel() + o1.numel() + 2 * o2.numel())


OPERATOR = Operator(
    "bilinear_fusion",
    reference,
    "Tensor o1, Tensor o2, Tensor weight, Tensor w1, Tensor w2, Tensor bias",
    (
        Implementation("triton", "cuda", _triton_allows, _triton_forward, _triton_backward, _outputs),
        Implementation("cpu", "cpu", _cpu_allows, _cpu_forward, _cpu_backward, worth=_cpu_worth),
    ),
    Workload(
        _example,
        tuple(
            {"rows": rows, "heads": heads, "d1": 400, "d2": 400}
            for rows in (1, 512, 4096, 16384)
            for heads in (1, 10)
        ),
        _moved,
        _computed,
    ),
)
