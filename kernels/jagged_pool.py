"""The weighted sum of each history's behaviours."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dispatch import Implementation, Operator, Workload
from kernels.jagged import rows_of, segment_sum
from kernels.target_layer import geometric_offsets


def jagged_pool(
    values: Tensor,
    scores: Tensor,
    offsets: Tensor,
    prior: Tensor | None = None,
    *,
    softmax: bool = False,
    fused: bool = True,
) -> Tensor:
    """Return sum_t w_t v_t over each row's behaviours v_t: w_t = s_t + prior_t, or their softmax within the row.

    Args:
        values: behaviours of all rows, (T, d).
        scores: s, (T,); of the type of the values or float32.
        offsets: where each row's behaviours begin, and T at the end, (B + 1,).
        prior: what a behaviour's position alone adds to its score, (T,), of the type of the scores; None stands
            for 0.
        softmax: whether a row's weights add up to 1. Otherwise scores are weights as they are.
        fused: False computes the definition.

    Returns:
        (B, d), zeros for an empty row; of the wider of the types of values and scores.

    Example:
        >>> values, offsets = torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([0, 2, 2, 3])
        >>> jagged_pool(values, torch.tensor([1.0, 1.0, 0.5]), offsets).T
        tensor([[3., 0., 2.]])
        >>> jagged_pool(values, torch.tensor([1.0, 1.0, 0.5]), offsets, softmax=True).T
        tensor([[1.5000, 0.0000, 4.0000]])

    Source: DIN, arXiv 1706.06978.
    """
    return OPERATOR(values, scores, offsets, prior, softmax, fused=fused)


def reference(values: Tensor, scores: Tensor, offsets: Tensor, prior: Tensor | None, softmax: bool) -> Tensor:
    """The definition, in plain torch."""
    rows, count = rows_of(offsets, values.shape[0]).long(), offsets.numel() - 1
    weights = scores if prior is None else scores + prior
    if softmax:
        highest = weights.detach().new_full((count,), -torch.inf).scatter_reduce(0, rows, weights.detach(), "amax")
        powers = (weights - highest[rows]).exp()
        weights = powers / powers.new_zeros(count).index_add(0, rows, powers)[rows]
    weighted = values * weights.unsqueeze(1)
    return weighted.new_zeros(count, values.shape[1]).index_add(0, rows, weighted)


def _cpu_weights(scores: Tensor, offsets: Tensor, prior: Tensor | None, softmax: bool) -> Tensor:
    weights = scores if prior is None else scores + prior
    if not softmax or not weights.numel():
        return weights
    rows = rows_of(offsets, weights.shape[0])
    highest = weights.new_full((offsets.numel() - 1,), -torch.inf).scatter_reduce_(0, rows.long(), weights, "amax")
    powers = (weights - highest.index_select(0, rows)).exp_()
    return powers.div_(segment_sum(powers.unsqueeze(1), offsets).squeeze(1).index_select(0, rows))


def _cpu_forward(
    values: Tensor, scores: Tensor, offsets: Tensor, prior: Tensor | None, softmax: bool
) -> tuple[Tensor, Tensor]:
    weights = _cpu_weights(scores, offsets, prior, softmax)
    return segment_sum(values, offsets, weights), weights


def _cpu_backward(
    gradient: Tensor, values: Tensor, scores: Tensor, offsets: Tensor, prior: Tensor | None, softmax: bool,
    weights: Tensor,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    rows = rows_of(offsets, values.shape[0])
    of_row = gradient.index_select(0, rows)  # (T, d)
    in_scores = torch.linalg.vecdot(of_row, values)
    if softmax:
        mean = segment_sum((in_scores * weights).unsqueeze(1), offsets).squeeze(1)
        in_scores.sub_(mean.index_select(0, rows)).mul_(weights)
    return of_row.mul_(weights.unsqueeze(1)), in_scores, None, None if prior is None else in_scores.clone(), None


@triton.jit
def _score(scores, prior, t, end, prior_given: tl.constexpr, softmax: tl.constexpr):
    s = tl.load(scores + t, mask=t < end, other=0.0).to(tl.float32)
    if prior_given:
        s += tl.load(prior + t, mask=t < end, other=0.0).to(tl.float32)
    return tl.where(t < end, s, -float("inf")) if softmax else s


@triton.jit
def _forward(
    values, scores, offsets, prior, out, levels, width: tl.constexpr, prior_given: tl.constexpr,
    softmax: tl.constexpr, block: tl.constexpr, block_width: tl.constexpr,
):  # fmt: skip
    """One row; a softmax's highest score and its sum are corrected on the way, so that values are read once."""
    row = tl.program_id(0).to(tl.int64)
    start, end = tl.load(offsets + row).to(tl.int64), tl.load(offsets + row + 1).to(tl.int64)
    column, step = tl.arange(0, block_width), tl.arange(0, block)
    highest = tl.full((1,), -float("inf"), tl.float32)
    total = tl.zeros((1,), tl.float32)
    pooled = tl.zeros((block_width,), tl.float32)
    for at in range(start, end, block):
        t = at + step
        v = tl.load(
            values + t[:, None] * width + column[None, :],
            mask=(t[:, None] < end) & (column[None, :] < width), other=0.0,
        ).to(tl.float32)  # fmt: skip
        w = _score(scores, prior, t, end, prior_given, softmax)
        if softmax:
            higher = tl.maximum(highest, tl.max(w, 0))
            w = tl.exp(w - higher)
            before = tl.exp(highest - higher)
            pooled *= before
            total = total * before + tl.sum(w, 0)
            highest = higher
        pooled += tl.sum(v * w[:, None], 0)
    if softmax and start < end:
        pooled /= total
        tl.store(levels + row + tl.arange(0, 1), highest + tl.log(total))
    tl.store(out + row * width + column, pooled, mask=column < width)


@triton.jit
def _backward(
    gradient, values, scores, offsets, prior, out, levels, in_values, in_scores, width: tl.constexpr,
    prior_given: tl.constexpr, softmax: tl.constexpr, block: tl.constexpr, block_width: tl.constexpr,
):  # fmt: skip
    """One row. What a softmax subtracts from the scores' gradients is the result times its own gradient."""
    row = tl.program_id(0).to(tl.int64)
    start, end = tl.load(offsets + row).to(tl.int64), tl.load(offsets + row + 1).to(tl.int64)
    column, step = tl.arange(0, block_width), tl.arange(0, block)
    g = tl.load(gradient + row * width + column, mask=column < width, other=0.0).to(tl.float32)
    level, mean = 0.0, 0.0
    if softmax and start < end:
        level = tl.load(levels + row)
        mean = tl.sum(g * tl.load(out + row * width + column, mask=column < width, other=0.0), 0)
    for at in range(start, end, block):
        t = at + step
        there = (t[:, None] < end) & (column[None, :] < width)
        place = t[:, None] * width + column[None, :]
        v = tl.load(values + place, mask=there, other=0.0).to(tl.float32)
        w = _score(scores, prior, t, end, prior_given, softmax)
        of_w = tl.sum(v * g[None, :], 1)
        if softmax:
            w = tl.exp(w - level)
            of_w = (of_w - mean) * w
        tl.store(in_values + place, w[:, None] * g[None, :], mask=there)
        tl.store(in_scores + t, of_w, mask=t < end)


def _triton_forward(
    values: Tensor, scores: Tensor, offsets: Tensor, prior: Tensor | None, softmax: bool
) -> tuple[Tensor, Tensor, Tensor]:
    rows, width = offsets.numel() - 1, values.shape[1]
    exact = values.new_empty(rows, width, dtype=torch.float32)
    levels = exact.new_empty(rows if softmax else 0)
    if rows:
        _forward[(rows,)](
            values.contiguous(), scores.contiguous(), offsets.contiguous(),
            scores if prior is None else prior.contiguous(), exact, levels, width, prior is not None, softmax, 32,
            triton.next_power_of_2(width), num_warps=4,
        )  # fmt: skip
    # A result that is its own record must not be the same tensor twice.
    kept = exact if softmax else exact.new_empty(0)
    out = exact.to(_kind(values, scores), copy=softmax)
    return out, kept, levels


def _triton_backward(
    gradient: Tensor, values: Tensor, scores: Tensor, offsets: Tensor, prior: Tensor | None, softmax: bool,
    exact: Tensor, levels: Tensor,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    rows, width = offsets.numel() - 1, values.shape[1]
    in_values = torch.empty_like(values, memory_format=torch.contiguous_format)
    in_scores = torch.empty_like(scores, memory_format=torch.contiguous_format)
    if rows:
        _backward[(rows,)](
            gradient.contiguous(), values.contiguous(), scores.contiguous(), offsets.contiguous(),
            scores if prior is None else prior.contiguous(), exact, levels, in_values, in_scores, width,
            prior is not None, softmax, 32, triton.next_power_of_2(width), num_warps=4,
        )  # fmt: skip
    return in_values, in_scores, None, None if prior is None else in_scores.clone(), None


def _kind(values: Tensor, scores: Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, scores.dtype)


def _fits(values: Tensor, scores: Tensor, offsets: Tensor, prior: Tensor | None) -> bool:
    """Whether there is a score, and perhaps a prior of its type, for each behaviour."""
    return (
        values.dim() == 2
        and scores.shape == values.shape[:1]
        and offsets.dim() == 1
        and (prior is None or (prior.shape == scores.shape and prior.dtype == scores.dtype))
    )


def _triton_allows(values: Tensor, scores: Tensor, offsets: Tensor, prior: Tensor | None, softmax: bool) -> bool:
    kinds = (torch.float32, torch.bfloat16, torch.float16)
    fits = _fits(values, scores, offsets, prior) and 1 <= values.shape[1] <= 512
    return fits and values.dtype in kinds and scores.dtype in kinds


def _cpu_allows(values: Tensor, scores: Tensor, offsets: Tensor, prior: Tensor | None, softmax: bool) -> bool:
    kinds = (torch.float32, torch.float64)
    return _fits(values, scores, offsets, prior) and values.dtype == scores.dtype and values.dtype in kinds


def _outputs(
    values: Tensor, scores: Tensor, offsets: Tensor, prior: Tensor | None, softmax: bool
) -> tuple[Tensor, Tensor, Tensor]:
    rows, width = offsets.numel() - 1, values.shape[1]
    exact = values.new_empty(rows if softmax else 0, width if softmax else 0, dtype=torch.float32)
    kept = exact if softmax else exact.new_empty(0)
    out = values.new_empty(rows, width, dtype=_kind(values, scores))
    return out, kept, exact.new_empty(rows if softmax else 0)


def _example(
    generator: torch.Generator, device: str, dtype: torch.dtype, *, rows: int, width: int, mean: int = 30
) -> tuple[Tensor | bool | None, ...]:
    offsets = geometric_offsets(generator, rows, mean)
    values = torch.randn(int(offsets[-1]), width, generator=generator).to(device, dtype)
    scores = torch.randn(values.shape[0], generator=generator).to(device, dtype)
    return values, scores, offsets.to(device), None, False


def _moved(values: Tensor, scores: Tensor, offsets: Tensor, prior: Tensor | None, softmax: bool) -> int:
    read = values.numel() + scores.numel() * (1 if prior is None else 2)
    return (read + (offsets.numel() - 1) * values.shape[1]) * values.element_size() + 8 * offsets.numel()


def _computed(values: Tensor, *rest: Tensor | bool | None) -> int:
    return 2 * values.numel()


OPERATOR = Operator(
    "jagged_pool",
    reference,
    "Tensor values, Tensor scores, Tensor offsets, Tensor? prior, bool softmax",
    (
        Implementation("triton", "cuda", _triton_allows, _triton_forward, _triton_backward, _outputs, returns=3),
        Implementation("cpu", "cpu", _cpu_allows, _cpu_forward, _cpu_backward, returns=2),
    ),
    Workload(
        _example,
        tuple({"rows": rows, "width": width} for rows in (1, 512, 16384) for width in (16, 64)),
        _moved,
        _computed,
    ),
)
