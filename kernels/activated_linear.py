"""A linear layer behind an activation, for many rows: what the activation returns is never laid out."""

from __future__ import annotations

from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from kernels.dispatch import Implementation, Operator, Workload, product_type
from kernels.jagged import blocks
from kernels.product import product, summed_product

Activation = Literal["dice", "sigmoid", "relu"]
KINDS: tuple[str, ...] = Activation.__args__  # type: ignore[attr-defined]


def activated_linear(
    s: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Activation,
    alpha: Tensor | None = None,
    mean: Tensor | None = None,
    rate: Tensor | None = None,
    fused: bool = True,
) -> Tensor:
    """Return W f(s) + b, where f is an activation that is computed anew in the backward.

    For Dice, f(s) = p s + (1 - p) alpha s with p = sigmoid((s - mean) * rate). The statistics are arguments, with
    gradients: moving averages in evaluation; in training those of s, whose gradient autograd takes on to s. So a
    perceptron with Dice keeps the inputs of its activations and nothing else.

    Args:
        s: (N, h).
        weight: W, (m, h).
        bias: b, (m,); None stands for 0.
        activation: ``dice``, ``sigmoid`` or ``relu``.
        alpha: Dice's slope below the mean, (h,).
        mean: Dice's mean, (h,).
        rate: 1 over Dice's standard deviation, (h,).
        fused: False computes the definition.

    Returns:
        (N, m).

    Example:
        >>> s, weight = torch.tensor([[-1.0, 2.0]]), torch.tensor([[10.0, 1.0]])
        >>> activated_linear(s, weight, activation="relu")
        tensor([[2.]])
        >>> zero, one = torch.zeros(2), torch.ones(2)
        >>> activated_linear(s, weight, activation="dice", alpha=one, mean=zero, rate=one)
        tensor([[-8.]])

    Source: Dice is from DIN, arXiv 1706.06978.
    """
    return OPERATOR(s, weight, bias, alpha, mean, rate, activation, fused=fused)


def reference(
    s: Tensor, weight: Tensor, bias: Tensor | None, alpha: Tensor | None, mean: Tensor | None, rate: Tensor | None,
    activation: str,
) -> Tensor:  # fmt: skip
    """The definition, in plain torch."""
    if activation == "dice":
        assert alpha is not None
        assert mean is not None
        assert rate is not None
        a = s * torch.addcmul(alpha, 1 - alpha, torch.sigmoid((s - mean) * rate))
    else:
        a = torch.sigmoid(s) if activation == "sigmoid" else torch.relu(s)
    return F.linear(a, weight, bias)


def _cpu_forward(
    s: Tensor, weight: Tensor, bias: Tensor | None, alpha: Tensor | None, mean: Tensor | None, rate: Tensor | None,
    activation: str,
) -> tuple[Tensor]:  # fmt: skip
    out = s.new_empty(s.shape[0], weight.shape[0])
    for part in blocks(*s.shape):
        own = s[part]
        if activation == "dice":
            assert alpha is not None
            assert mean is not None
            assert rate is not None
            p = torch.addcmul(-mean * rate, own, rate).sigmoid_()
            a = torch.addcmul(alpha, 1 - alpha, p, out=p).mul_(own)
        else:
            a = torch.sigmoid(own) if activation == "sigmoid" else torch.relu(own)
        out[part] = product(a, weight, bias)
    return (out,)


def _cpu_backward(
    gradient: Tensor, s: Tensor, weight: Tensor, bias: Tensor | None, alpha: Tensor | None, mean: Tensor | None,
    rate: Tensor | None, activation: str,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    in_s, in_weight = torch.empty_like(s), torch.zeros_like(weight)
    of_a, of_p, of_logit, of_rate = s.new_zeros(4, s.shape[1])
    for part in blocks(*s.shape):
        own, g, out = s[part], gradient[part], in_s[part]
        d = product(g, weight.T)  # (n, h), of the activation
        if activation == "dice":
            assert alpha is not None
            assert mean is not None
            assert rate is not None
            p = torch.addcmul(-mean * rate, own, rate).sigmoid_()
            mixed = torch.addcmul(alpha, 1 - alpha, p)
            torch.mul(d, mixed, out=out)
            in_weight += summed_product(g, mixed.mul_(own))
            d.mul_(own)
            of_a += d.sum(0)
            d.mul_(p)
            of_p += d.sum(0)
            d.addcmul_(d, p, value=-1)  # of the logit, but for 1 - alpha
            of_logit += d.sum(0)
            out.addcmul_(d, rate * (1 - alpha))
            of_rate += d.mul_(own).sum(0)
        else:
            a = torch.sigmoid(own) if activation == "sigmoid" else torch.relu(own)
            in_weight += summed_product(g, a)
            torch.mul(d, a.addcmul_(a, a, value=-1) if activation == "sigmoid" else a.sign_(), out=out)
    in_bias = None if bias is None else gradient.sum(0)
    if activation != "dice":
        return in_s, in_weight, in_bias, None, None, None, None
    assert alpha is not None
    assert mean is not None
    assert rate is not None
    in_mean, in_rate = -(1 - alpha) * rate * of_logit, (1 - alpha) * (of_rate - mean * of_logit)
    return in_s, in_weight, in_bias, of_a - of_p, in_mean, in_rate, None


@triton.jit
def _activated(s, mixed_by, mean, rate, kind: tl.constexpr):
    """Return what the activation returns, and p of Dice or the same again."""
    if kind == 0:
        p = tl.sigmoid((s - mean[None, :]) * rate[None, :])
        a = s * (mixed_by[None, :] + (1 - mixed_by[None, :]) * p)
    elif kind == 1:
        p = tl.sigmoid(s)
        a = p
    else:
        p = tl.maximum(s, 0.0)
        a = p
    return a, p


@triton.jit
def _forward(
    s, weight, bias, alpha, mean, rate, out, rows, size: tl.constexpr, outputs: tl.constexpr,
    kind: tl.constexpr, biased: tl.constexpr, product: tl.constexpr,
    block: tl.constexpr, block_size: tl.constexpr, block_outputs: tl.constexpr,
):  # fmt: skip
    """So many rows, some units at a time: all at once, float32 would not fit into registers."""
    row = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    column = tl.arange(0, block_outputs)
    there = row[:, None] < rows
    result = tl.zeros((block, block_outputs), tl.float32)
    for start in range(0, size, block_size):
        unit = start + tl.arange(0, block_size)
        real = unit < size
        slope = tl.load(alpha + unit, mask=real, other=0.0).to(tl.float32)
        centre = tl.load(mean + unit, mask=real, other=0.0).to(tl.float32)
        by = tl.load(rate + unit, mask=real, other=0.0).to(tl.float32)
        x = tl.load(s + row[:, None] * size + unit[None, :], mask=there & real[None, :], other=0.0).to(tl.float32)
        w = tl.load(
            weight + column[None, :] * size + unit[:, None],
            mask=(column[None, :] < outputs) & real[:, None], other=0.0,
        )  # fmt: skip
        a, _p = _activated(x, slope, centre, by, kind)
        result = tl.dot(a.to(product), w.to(product), result, input_precision="ieee")
    if biased:
        result += tl.load(bias + column, mask=column < outputs, other=0.0).to(tl.float32)[None, :]
    tl.store(out + row[:, None] * outputs + column[None, :], result, mask=there & (column[None, :] < outputs))


@triton.jit
def _backward(
    gradient, s, weight, alpha, mean, rate, in_s, in_weight, in_bias, in_units, rows,
    size: tl.constexpr, outputs: tl.constexpr, kind: tl.constexpr, product: tl.constexpr,
    block: tl.constexpr, block_size: tl.constexpr, block_outputs: tl.constexpr,
):  # fmt: skip
    """Every so many blocks of rows; sums over them stay in registers."""
    unit, column, step = tl.arange(0, block_size), tl.arange(0, block_outputs), tl.arange(0, block)
    real = unit < size
    slope = tl.load(alpha + unit, mask=real, other=0.0).to(tl.float32)
    centre = tl.load(mean + unit, mask=real, other=0.0).to(tl.float32)
    by = tl.load(rate + unit, mask=real, other=0.0).to(tl.float32)
    own = (column[:, None] < outputs) & real[None, :]
    w = tl.load(weight + column[:, None] * size + unit[None, :], mask=own, other=0.0)  # (m, h)
    of_weight = tl.zeros((block_outputs, block_size), tl.float32)
    of_bias = tl.zeros((block_outputs,), tl.float32)
    of_slope = tl.zeros((block_size,), tl.float32)
    of_centre = tl.zeros((block_size,), tl.float32)
    of_by = tl.zeros((block_size,), tl.float32)
    for start in range(tl.program_id(0) * block, rows, tl.num_programs(0) * block):
        row = tl.cast(start, tl.int64) + step
        there = (row[:, None] < rows) & real[None, :]
        place = row[:, None] * size + unit[None, :]
        x = tl.load(s + place, mask=there, other=0.0).to(tl.float32)
        g = tl.load(
            gradient + row[:, None] * outputs + column[None, :],
            mask=(row[:, None] < rows) & (column[None, :] < outputs), other=0.0,
        )  # fmt: skip
        d = tl.dot(g.to(product), w.to(product), input_precision="ieee")
        a, p = _activated(x, slope, centre, by, kind)
        of_weight = tl.dot(tl.trans(g.to(product)), a.to(product), of_weight, input_precision="ieee")
        of_bias += tl.sum(g.to(tl.float32), 0)
        if kind == 0:
            of_logit = d * x * (1 - slope[None, :]) * p * (1 - p)
            of_slope += tl.sum(d * x * (1 - p), 0)
            of_centre -= tl.sum(of_logit, 0)
            of_by += tl.sum(of_logit * (x - centre[None, :]), 0)
            result = d * (slope[None, :] + (1 - slope[None, :]) * p) + of_logit * by[None, :]
        elif kind == 1:
            result = d * p * (1 - p)
        else:
            result = tl.where(x > 0, d, 0.0)
        tl.store(in_s + place, result, mask=there)
    program = tl.program_id(0).to(tl.int64)
    tl.store(in_weight + program * outputs * size + column[:, None] * size + unit[None, :], of_weight, mask=own)
    tl.store(in_bias + program * outputs + column, of_bias, mask=column < outputs)
    if kind == 0:
        tl.store(in_units + program * 3 * size + unit, of_slope, mask=real)
        tl.store(in_units + program * 3 * size + size + unit, of_centre * by, mask=real)
        tl.store(in_units + program * 3 * size + 2 * size + unit, of_by, mask=real)


_PROGRAMS = 512
"""Programs that share the rows of a backward: each adds up the weights' gradients of its own."""


def _tiles(size: int, outputs: int) -> tuple[int, int]:
    return max(triton.next_power_of_2(size), 16), max(triton.next_power_of_2(outputs), 16)


def _triton_forward(
    s: Tensor, weight: Tensor, bias: Tensor | None, alpha: Tensor | None, mean: Tensor | None, rate: Tensor | None,
    activation: str,
) -> tuple[Tensor]:  # fmt: skip
    (rows, size), outputs = s.shape, weight.shape[0]
    out = s.new_empty(rows, outputs)
    # Kernels read the statistics whatever the activation; any h numbers stand in for absent ones.
    units = [weight if unit is None else unit.contiguous() for unit in (alpha, mean, rate)]
    block_size, block_outputs = _tiles(size, outputs)
    if rows:
        _forward[(triton.cdiv(rows, 64),)](
            s.contiguous(), weight.contiguous(), weight if bias is None else bias.contiguous(), *units, out, rows,
            size, outputs, KINDS.index(activation), bias is not None, product_type(s.dtype), 64,
            min(block_size, 32), block_outputs, num_warps=4,
        )  # fmt: skip
    return (out,)


def _triton_backward(
    gradient: Tensor, s: Tensor, weight: Tensor, bias: Tensor | None, alpha: Tensor | None, mean: Tensor | None,
    rate: Tensor | None, activation: str,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    (rows, size), outputs = s.shape, weight.shape[0]
    programs = min(triton.cdiv(rows, 16), _PROGRAMS)
    exact = {"dtype": torch.float32, "device": s.device}
    in_s = torch.empty_like(s, memory_format=torch.contiguous_format)
    weights, biases = torch.empty(programs, outputs, size, **exact), torch.empty(programs, outputs, **exact)
    of_units = torch.empty(programs, 3, size, **exact)
    units = [weight if unit is None else unit.contiguous() for unit in (alpha, mean, rate)]
    if rows:
        _backward[(programs,)](
            gradient.contiguous(), s.contiguous(), weight.contiguous(), *units, in_s, weights, biases, of_units,
            rows, size, outputs, KINDS.index(activation), product_type(s.dtype), 16, *_tiles(size, outputs),
            num_warps=8,
        )  # fmt: skip
    in_bias = None if bias is None else biases.sum(0).to(bias.dtype)
    of_alpha, of_mean, of_rate = (
        (None, None, None)
        if alpha is None or mean is None or rate is None
        else (found.to(alpha.dtype, copy=True) for found in of_units.sum(0))  # no two views of one
    )
    return in_s, weights.sum(0).to(weight.dtype), in_bias, of_alpha, of_mean, of_rate, None


def _fits(s: Tensor, weight: Tensor, bias: Tensor | None, *rest: Tensor | str | None) -> bool:
    """Whether all are of one floating type, and of the shapes that the function names."""
    units, activation = [one for one in rest if isinstance(one, Tensor)], rest[-1]
    return (
        s.dim() == weight.dim() == 2
        and s.shape[1] == weight.shape[1]
        and s.dtype == weight.dtype
        and (bias is None or (bias.shape == weight.shape[:1] and bias.dtype == s.dtype))
        and (activation in ("sigmoid", "relu") or (activation == "dice" and len(units) == 3))
        and all(one.shape == s.shape[1:] and one.dtype == s.dtype for one in units)
    )


def _triton_allows(s: Tensor, weight: Tensor, *rest: Any) -> bool:
    block_size, block_outputs = _tiles(s.shape[-1], weight.shape[0])
    fits = s.dtype in (torch.float32, torch.bfloat16, torch.float16) and _fits(s, weight, *rest)
    return fits and block_size * block_outputs <= 8192


def _cpu_allows(s: Tensor, *rest: Any) -> bool:
    return s.dtype in (torch.float32, torch.float64) and _fits(s, *rest)


def _cpu_worth(s: Tensor, *_rest: Any) -> bool:
    return s.numel() >= 2**18


def _outputs(s: Tensor, weight: Tensor, *rest: Tensor | str | None) -> tuple[Tensor]:
    return (s.new_empty(s.shape[0], weight.shape[0]),)


def _example(
    generator: torch.Generator, device: str, dtype: torch.dtype, *, rows: int, size: int, outputs: int
) -> tuple[Tensor | str, ...]:
    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(device, dtype)

    rate = (torch.rand(size, generator=generator) + 0.5).to(device, dtype)
    weight = draw(outputs, size, scale=size**-0.5)
    return draw(rows, size), weight, draw(outputs), draw(size), draw(size), rate, "dice"


def _moved(s: Tensor, weight: Tensor, *rest: Tensor | str | None) -> int:
    return (s.numel() + weight.numel() + s.shape[0] * weight.shape[0]) * s.element_size()


def _computed(s: Tensor, weight: Tensor, *rest: Tensor | str | None) -> int:
    return 2 * s.shape[0] * weight.numel()


OPERATOR = Operator(
    "activated_linear",
    reference,
    "Tensor s, Tensor weight, Tensor? bias, Tensor? alpha, Tensor? mean, Tensor? rate, str activation",
    (
        Implementation("triton", "cuda", _triton_allows, _triton_forward, _triton_backward, _outputs),
        Implementation("cpu", "cpu", _cpu_allows, _cpu_forward, _cpu_backward, worth=_cpu_worth),
    ),
    Workload(
        _example,
        tuple({"rows": rows, "size": 80, "outputs": outputs} for rows in (1, 16384, 491520) for outputs in (1, 40)),
        _moved,
        _computed,
    ),
)
