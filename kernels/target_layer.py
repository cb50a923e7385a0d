"""The first layer of target attention: candidate against behaviours, without their concatenation."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from kernels.dispatch import Implementation, Operator, Workload, product_type
from kernels.jagged import blocks, row_blocks, rows_of, segment_sum
from kernels.product import product, summed_product


def target_layer(
    values: Tensor, offsets: Tensor, query: Tensor, weight: Tensor, bias: Tensor, *, fused: bool = True
) -> Tensor:
    """Return W [q, k, q - k, q * k] + b for each behaviour k of a row with candidate q.

    With W cut into W_q, W_k, W_d, W_p, nothing is concatenated:

        W [q, k, q - k, q * k] = (W_q + W_d) q + (W_k - W_d + W_p Diag(q)) k,

    where the first term is computed once a row, and the second is d numbers a behaviour instead of 4 d.

    Args:
        values: behaviours k of all rows, (T, d).
        offsets: where each row's behaviours begin, and T at the end, (B + 1,).
        query: the candidates q, (B, d).
        weight: W, (h, 4 d).
        bias: b, (h,).
        fused: False computes the definition.

    Returns:
        (T, h).

    Example:
        >>> k, q, offsets = torch.tensor([[3.0], [5.0]]), torch.tensor([[2.0]]), torch.tensor([0, 2])
        >>> target_layer(k, offsets, q, torch.tensor([[1.0, 10.0, 100.0, 1000.0]]), torch.zeros(1))
        tensor([[5932.],
                [9752.]])

    Source: DIN, arXiv 1706.06978.
    """
    return OPERATOR(values, offsets, query, weight, bias, fused=fused)


def reference(values: Tensor, offsets: Tensor, query: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The definition, in plain torch."""
    rows = rows_of(offsets, values.shape[0])
    of_query, of_key, of_difference, of_product = weight.chunk(4, dim=1)  # (h, d) each
    asked = F.linear(query, of_query + of_difference, bias)  # (B, h)
    met = F.linear(values, of_key - of_difference) + F.linear(values * query[rows], of_product)  # (T, h)
    return met + asked[rows]


def _parts(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return what multiplies the candidate, the behaviour, and the product of both, (h, d) each."""
    # Laid out anew: sums of transposed matrices would be transposed too, and kernels go by rows.
    of_query, of_key, of_difference, of_product = weight.contiguous().chunk(4, dim=1)
    return of_query + of_difference, of_key - of_difference, of_product.contiguous()


def _joined(of_query: Tensor, of_key: Tensor, of_product: Tensor) -> Tensor:
    """Return the gradient of W, from those of the parts."""
    return torch.cat((of_query, of_key, of_query - of_key, of_product), dim=1)


def _cpu_forward(values: Tensor, offsets: Tensor, query: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor]:
    of_query, *both = _parts(weight)
    of_both = torch.cat(both, dim=1)  # (h, 2 d)
    rows = rows_of(offsets, values.shape[0])
    out = product(query, of_query, bias).index_select(0, rows)  # (T, h)
    for part in blocks(*out.shape):
        out[part].add_(product(_met(values[part], query.index_select(0, rows[part])), of_both))
    return (out,)


def _cpu_backward(
    gradient: Tensor, values: Tensor, offsets: Tensor, query: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor | None, ...]:
    of_query, *both = _parts(weight)
    of_both, width = torch.cat(both, dim=1), values.shape[1]
    rows = rows_of(offsets, values.shape[0])
    asked = gradient.new_empty(query.shape[0], bias.shape[0])  # (B, h), of the term of each row
    in_values, in_query = torch.empty_like(values), torch.empty_like(query)
    in_both = torch.zeros_like(of_both)
    for its_rows, part in row_blocks(offsets, bias.shape[0]):
        k, g, q = values[part], gradient[part], query.index_select(0, rows[part])
        met = product(g, of_both.T)  # (n, 2 d), of k and of q * k
        torch.addcmul(met[:, :width], met[:, width:], q, out=in_values[part])
        starts = offsets[its_rows.start : its_rows.stop + 1] - part.start
        in_query[its_rows] = segment_sum(met[:, width:] * k, starts)
        asked[its_rows] = segment_sum(g, starts)
        in_both += summed_product(g, _met(k, q))
    in_query += product(asked, of_query.T)
    in_weight = _joined(summed_product(asked, query), *in_both.chunk(2, dim=1))
    return in_values, None, in_query, in_weight, asked.sum(0)


def _met(k: Tensor, q: Tensor) -> Tensor:
    """Return [k, q * k], (n, 2 d)."""
    met = k.new_empty(len(k), 2 * k.shape[1])
    met[:, : k.shape[1]] = k
    torch.mul(q, k, out=met[:, k.shape[1] :])
    return met


@triton.jit
def _forward(
    values, offsets, query, asked, of_key, of_product, out, width: tl.constexpr, size: tl.constexpr,
    product: tl.constexpr, block: tl.constexpr, block_width: tl.constexpr, block_size: tl.constexpr,
):  # fmt: skip
    """All behaviours of a row: its own matrix W_k - W_d + W_p Diag(q) is made once and stays in registers."""
    row = tl.program_id(0)
    start, end = tl.load(offsets + row).to(tl.int64), tl.load(offsets + row + 1).to(tl.int64)
    if start < end:
        column, unit, step = tl.arange(0, block_width), tl.arange(0, block_size), tl.arange(0, block)
        tile = column[:, None] + unit[None, :] * width  # transposed, (d, h)
        own = (column[:, None] < width) & (unit[None, :] < size)
        place = row.to(tl.int64)
        q = tl.load(query + place * width + column, mask=column < width, other=0.0).to(tl.float32)
        w = tl.load(of_key + tile, mask=own, other=0.0).to(tl.float32)
        w += tl.load(of_product + tile, mask=own, other=0.0).to(tl.float32) * q[:, None]
        first = tl.load(asked + place * size + unit, mask=unit < size, other=0.0).to(tl.float32)
        for at in range(start, end, block):
            t = at + step
            k = tl.load(
                values + t[:, None] * width + column[None, :],
                mask=(t[:, None] < end) & (column[None, :] < width), other=0.0,
            )  # fmt: skip
            met = tl.dot(k.to(product), w.to(product), input_precision="ieee") + first[None, :]
            tl.store(out + t[:, None] * size + unit[None, :], met, mask=(t[:, None] < end) & (unit[None, :] < size))


@triton.jit
def _backward(
    gradient, values, offsets, query, of_key, of_product, in_values, in_query, in_asked, in_weights, rows,
    width: tl.constexpr, size: tl.constexpr, product: tl.constexpr,
    block: tl.constexpr, block_width: tl.constexpr, block_size: tl.constexpr,
):  # fmt: skip
    """All behaviours of every so many rows. One product a row, M = G' K, is all that the other gradients need.

    Those of both weights are the sums over rows of M and of M Diag(q); that of q is the sum of W_p * M over units.
    """
    column, unit, step = tl.arange(0, block_width), tl.arange(0, block_size), tl.arange(0, block)
    tile = unit[:, None] * width + column[None, :]  # (h, d)
    own = (unit[:, None] < size) & (column[None, :] < width)
    w_key = tl.load(of_key + tile, mask=own, other=0.0).to(tl.float32)
    w_product = tl.load(of_product + tile, mask=own, other=0.0).to(tl.float32)
    in_key = tl.zeros((block_size, block_width), tl.float32)
    in_product = tl.zeros((block_size, block_width), tl.float32)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        start, end = tl.load(offsets + row).to(tl.int64), tl.load(offsets + row + 1).to(tl.int64)
        place = tl.cast(row, tl.int64)
        q = tl.load(query + place * width + column, mask=column < width, other=0.0).to(tl.float32)
        w = w_key + w_product * q[None, :]
        both = tl.zeros((block_size, block_width), tl.float32)  # M
        asked = tl.zeros((block_size,), tl.float32)
        for at in range(start, end, block):
            t = at + step
            there = (t[:, None] < end) & (column[None, :] < width)
            k = tl.load(values + t[:, None] * width + column[None, :], mask=there, other=0.0)
            g = tl.load(
                gradient + t[:, None] * size + unit[None, :],
                mask=(t[:, None] < end) & (unit[None, :] < size), other=0.0,
            )  # fmt: skip
            of_k = tl.dot(g.to(product), w.to(product), input_precision="ieee")
            tl.store(in_values + t[:, None] * width + column[None, :], of_k, mask=there)
            both = tl.dot(tl.trans(g.to(product)), k.to(product), both, input_precision="ieee")
            asked += tl.sum(g.to(tl.float32), 0)
        in_key += both
        in_product += both * q[None, :]
        tl.store(in_query + place * width + column, tl.sum(both * w_product, 0), mask=column < width)
        tl.store(in_asked + place * size + unit, asked, mask=unit < size)
    partial = in_weights + tl.program_id(0).to(tl.int64) * 2 * size * width
    tl.store(partial + tile, in_key, mask=own)
    tl.store(partial + size * width + tile, in_product, mask=own)


_PROGRAMS = 512
"""Programs that share the rows of a backward: each adds up the weights' gradients of its own."""


def _tiles(width: int, size: int) -> tuple[int, int]:
    return max(triton.next_power_of_2(width), 16), max(triton.next_power_of_2(size), 16)


def _triton_forward(values: Tensor, offsets: Tensor, query: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor]:
    of_query, of_key, of_product = _parts(weight)
    asked = F.linear(query, of_query, bias)  # (B, h)
    (rows, width), size = query.shape, bias.shape[0]
    out = values.new_empty(values.shape[0], size)
    if values.shape[0]:
        _forward[(rows,)](
            values.contiguous(), offsets.contiguous(), query.contiguous(), asked, of_key, of_product, out, width,
            size, product_type(values.dtype), 32, *_tiles(width, size), num_warps=4,
        )  # fmt: skip
    return (out,)


def _triton_backward(
    gradient: Tensor, values: Tensor, offsets: Tensor, query: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor | None, ...]:
    of_query, of_key, of_product = _parts(weight)
    (rows, width), size = query.shape, bias.shape[0]
    programs = min(rows, _PROGRAMS)
    exact = {"dtype": torch.float32, "device": values.device}
    in_values, in_query = values.new_empty(values.shape), torch.empty(rows, width, **exact)
    asked, weights = torch.empty(rows, size, **exact), torch.empty(programs, 2, size, width, **exact)
    if rows:
        _backward[(programs,)](
            gradient.contiguous(), values.contiguous(), offsets.contiguous(), query.contiguous(), of_key,
            of_product, in_values, in_query, asked, weights, rows, width, size,
            product_type(values.dtype), 32, *_tiles(width, size), num_warps=8,
        )  # fmt: skip
    in_query = torch.addmm(in_query, asked, of_query.float())
    in_key, in_product = weights.sum(0)
    in_weight = _joined(torch.mm(asked.T, query.float()), in_key, in_product)
    kind = values.dtype
    return in_values, None, in_query.to(kind), in_weight.to(kind), asked.sum(0).to(kind)


def _fits(values: Tensor, offsets: Tensor, query: Tensor, weight: Tensor, bias: Tensor) -> bool:
    """Whether all are of one floating type, and of the shapes that the function names."""
    width = values.shape[-1]
    return (
        values.dim() == 2
        and offsets.dim() == 1
        and query.shape == (offsets.numel() - 1, width)
        and weight.shape == (bias.numel(), 4 * width)
        and bias.dim() == 1
        and values.dtype == query.dtype == weight.dtype == bias.dtype
    )


def _triton_allows(values: Tensor, offsets: Tensor, query: Tensor, weight: Tensor, bias: Tensor) -> bool:
    block_width, block_size = _tiles(values.shape[-1], bias.numel())
    fits = values.dtype in (torch.float32, torch.bfloat16, torch.float16)
    # The matrix of a row has to fit into the registers of a program.
    return fits and block_width * block_size <= 8192 and _fits(values, offsets, query, weight, bias)


def _cpu_allows(values: Tensor, offsets: Tensor, query: Tensor, weight: Tensor, bias: Tensor) -> bool:
    return values.dtype in (torch.float32, torch.float64) and _fits(values, offsets, query, weight, bias)


def _cpu_worth(values: Tensor, *_others: Tensor) -> bool:
    return len(values) >= 1024


def _outputs(values: Tensor, offsets: Tensor, query: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor]:
    return (values.new_empty(values.shape[0], bias.shape[0]),)


def geometric_offsets(generator: torch.Generator, rows: int, mean: int = 30, longest: int = 200) -> Tensor:
    """Draw the offsets of ``rows`` histories, their lengths geometric and cut at ``longest``, (rows + 1,).

    Example:
        >>> geometric_offsets(torch.Generator().manual_seed(0), 3).shape
        torch.Size([4])
    """
    lengths = torch.empty(rows).geometric_(1 / mean, generator=generator).clamp_(max=longest).long()
    return F.pad(lengths.cumsum(0), (1, 0))


def _example(
    generator: torch.Generator,
    device: str,
    dtype: torch.dtype,
    *,
    rows: int,
    width: int,
    hidden: int,
    mean: int = 30,
) -> tuple[Tensor, ...]:
    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(device, dtype)

    offsets = geometric_offsets(generator, rows, mean)
    return (
        draw(int(offsets[-1]), width),
        offsets.to(device),
        draw(rows, width),
        draw(hidden, 4 * width, scale=(4 * width) ** -0.5),
        draw(hidden),
    )


def _moved(values: Tensor, offsets: Tensor, query: Tensor, weight: Tensor, bias: Tensor) -> int:
    out = values.shape[0] * bias.shape[0]
    return (values.numel() + query.numel() + weight.numel() + out) * values.element_size() + 8 * offsets.numel()


def _computed(values: Tensor, offsets: Tensor, query: Tensor, weight: Tensor, bias: Tensor) -> int:
    return 2 * (values.shape[0] + query.shape[0]) * weight.numel() // 4


OPERATOR = Operator(
    "target_layer",
    reference,
    "Tensor values, Tensor offsets, Tensor query, Tensor weight, Tensor bias",
    (
        Implementation("triton", "cuda", _triton_allows, _triton_forward, _triton_backward, _outputs),
        Implementation("cpu", "cpu", _cpu_allows, _cpu_forward, _cpu_backward, worth=_cpu_worth),
    ),
    Workload(
        _example,
        tuple({"rows": rows, "width": width, "hidden": 80} for rows in (1, 512, 16384) for width in (16, 64)),
        _moved,
        _computed,
    ),
)
