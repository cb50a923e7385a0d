"""All layers of a gated cross network: for small D in one launch, in which a row never leaves the registers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dispatch import Implementation, Operator, Workload, product_type
from kernels.gated_cross import both_products, gated_cross, triton_backward
from kernels.gated_cross import reference as one_layer

NARROW = {torch.float32: 64, torch.bfloat16: 128, torch.float16: 128}
"""The largest D of which one program holds a block of rows, by dtype.

A product needs the whole row, so that D is not cut into tiles: a program holds c0, c and both accumulators of its
rows in registers, 4 D numbers of float32 a row. An H100's tensor cores take 64 rows at a time: for D = 128 that is
128 KiB of the 256 KiB that a multiprocessor has, for D = 256 all of them. Float32 does without tensor cores, whose
operands then need registers too: compiled for an H100, 16 rows of D = 64 fit; of D = 128, 5 KB a thread do not.
"""


def cross_network(
    c0: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None = None,
    gates: Sequence[Tensor] | None = None,
    *,
    fused: bool = True,
) -> Tensor:
    """Return c_L of c_{l+1} = c_0 * (W_l c_l + b_l) * sigmoid(G_l c_l) + c_l.

    Where one launch computes all layers, their weights are put together, a copy; elsewhere, as on CPU, each layer
    is a call of :func:`kernels.gated_cross`.

    Args:
        c0: (B, D).
        weights: W of each layer, (D, D).
        biases: b of each layer, (D,); None stands for 0.
        gates: G of each layer, (D, D); None stands for gates of 1 and costs nothing.
        fused: False computes the definition.

    Returns:
        (B, D).

    Example:
        >>> c0, two = torch.tensor([[2.0]]), torch.tensor([[3.0]])
        >>> cross_network(c0, [two, two])  # 2 * 6 + 2 = 14, 2 * 42 + 14 = 98
        tensor([[98.]])

    Source: GDCN, arXiv 2311.04635; DCN-V2, arXiv 2008.13535.
    """
    given = (weights, biases, gates)
    if fused and c0.device.type == ONE_LAUNCH.device:
        alike = (None if one is None else one[0].expand(len(one), *one[0].shape) for one in given)
        if OPERATOR.chosen(c0, *alike) == ONE_LAUNCH.name:
            return OPERATOR(c0, *(None if one is None else torch.stack(tuple(one)) for one in given))
    c = c0
    for weight, bias, gate in _each(weights, biases, gates):
        c = gated_cross(c0, c, weight, bias, gate, fused=fused)
    return c


def reference(c0: Tensor, weights: Tensor, biases: Tensor | None, gates: Tensor | None) -> Tensor:
    """The definition, in plain torch; weights (L, D, D), biases (L, D), gates (L, D, D)."""
    c = c0
    for weight, bias, gate in _each(weights, biases, gates):
        c = one_layer(c0, c, weight, bias, gate)
    return c


def _each(
    weights: Sequence[Tensor] | Tensor, biases: Sequence[Tensor] | Tensor | None,
    gates: Sequence[Tensor] | Tensor | None,
) -> Iterator[tuple[Tensor, Tensor | None, Tensor | None]]:  # fmt: skip
    """Return what each layer has of all three."""
    absent = [None] * len(weights)
    return zip(weights, absent if biases is None else biases, absent if gates is None else gates, strict=True)


@triton.jit
def _network(
    c0, weights, biases, gates, out, rows, layers: tl.constexpr, width: tl.constexpr, every: tl.constexpr,
    gated: tl.constexpr, biased: tl.constexpr, product: tl.constexpr,
    block_rows: tl.constexpr, block_width: tl.constexpr,
):  # fmt: skip
    """Some rows through all layers; ``every`` writes the output of each layer, (L, B, D), not of the last alone."""
    row = tl.program_id(0).to(tl.int64) * block_rows + tl.arange(0, block_rows)
    column = tl.arange(0, block_width)
    own = (row[:, None] < rows) & (column[None, :] < width)
    square = (column[:, None] < width) & (column[None, :] < width)
    first = tl.load(c0 + row[:, None] * width + column[None, :], mask=own, other=0.0).to(tl.float32)
    c = first
    for layer in range(layers):
        turned = layer * width * width + column[None, :] * width + column[:, None]
        w = tl.load(weights + turned, mask=square, other=0.0)
        crossed = tl.dot(c.to(product), w.to(product), input_precision="ieee")
        if biased:
            bias = tl.load(biases + layer * width + column, mask=column < width, other=0.0)
            crossed += bias.to(tl.float32)[None, :]
        if gated:
            g = tl.load(gates + turned, mask=square, other=0.0)
            crossed *= tl.sigmoid(tl.dot(c.to(product), g.to(product), input_precision="ieee"))
        c = first * crossed + c
        if every:
            tl.store(out + (row[:, None] + layer * rows) * width + column[None, :], c, mask=own)
    if not every:
        tl.store(out + row[:, None] * width + column[None, :], c, mask=own)


def _tiles(width: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Return rows, columns and warps of a program."""
    block_width = max(triton.next_power_of_2(width), 16)
    small = block_width <= 32
    return 64 if small or dtype != torch.float32 else 16, block_width, 4 if small else 8


def _launch(c0: Tensor, weights: Tensor, biases: Tensor | None, gates: Tensor | None, *, every: int = 0) -> Tensor:
    """Return c_L, or c_1 to c_``every``."""
    c0, weights = c0.contiguous(), weights.contiguous()
    rows, width = c0.shape
    out = c0.new_empty(every, rows, width) if every else torch.empty_like(c0)
    block_rows, block_width, warps = _tiles(width, c0.dtype)
    if rows:
        _network[(triton.cdiv(rows, block_rows),)](
            c0, weights, c0 if biases is None else biases.contiguous(), c0 if gates is None else gates.contiguous(),
            out, rows, every or len(weights), width, every > 0, gates is not None, biases is not None,
            product_type(c0.dtype), block_rows, block_width, num_warps=warps, num_stages=1,
        )  # fmt: skip
    return out


def _triton_forward(c0: Tensor, weights: Tensor, biases: Tensor | None, gates: Tensor | None) -> tuple[Tensor]:
    return (_launch(c0, weights, biases, gates),)


def _triton_backward(
    gradient: Tensor, c0: Tensor, weights: Tensor, biases: Tensor | None, gates: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The forward again, which now writes each layer's input; then layer by layer, products computed anew."""
    inputs = [c0]
    if len(weights) > 1:
        inputs += _launch(c0, weights, biases, gates, every=len(weights) - 1)

    def backward(
        gradient: Tensor, _number: int, c: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        both = both_products(c, weight, gate)
        return triton_backward(gradient, c0, c, weight, bias, gate, both)

    return _layers_backward(gradient, inputs, weights, biases, gates, backward)


def _layers_backward(
    gradient: Tensor, inputs: Sequence[Tensor], weights: Tensor, biases: Tensor | None, gates: Tensor | None,
    backward: Callable[..., tuple[Tensor | None, ...]],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Return the gradients of all arguments, from each layer's input and what goes back through one of them."""
    of_c0 = inputs[0].new_zeros(inputs[0].shape)
    slopes: list[Sequence[Tensor | None]] = []
    for number, parts in reversed(list(enumerate(_each(weights, biases, gates)))):
        of_first, of_c, *rest = backward(gradient, number, inputs[number], *parts)
        assert of_first is not None
        assert of_c is not None
        of_c0 += of_first
        gradient = of_c
        slopes.insert(0, rest)
    of_c0 += gradient
    each = zip(*slopes, strict=True)  # of the weights, of the biases, of the gates
    return of_c0, *(None if one[0] is None else torch.stack(one) for one in each)  # type: ignore[arg-type]


def _fits(c0: Tensor, weights: Tensor, biases: Tensor | None, gates: Tensor | None) -> bool:
    """Whether all are of one floating type, and of the shapes that the function names."""
    width, number = c0.shape[-1], len(weights)
    return (
        c0.dim() == 2
        and number > 0
        and weights.shape == (number, width, width)
        and (biases is None or biases.shape == (number, width))
        and (gates is None or gates.shape == weights.shape)
        and all(t is None or t.dtype == c0.dtype for t in (weights, biases, gates))
    )


def _triton_allows(c0: Tensor, *others: Any) -> bool:
    return c0.shape[-1] <= NARROW.get(c0.dtype, 0) and _fits(c0, *others)


def _outputs(c0: Tensor, *others: Any) -> tuple[Tensor]:
    return (c0.new_empty(c0.shape),)


def _example(
    generator: torch.Generator, device: str, dtype: torch.dtype, *, rows: int, width: int, layers: int
) -> tuple[Tensor, ...]:
    def draw(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*size, generator=generator) * scale).to(device, dtype)

    square = {"scale": width**-0.5}
    return (
        draw(rows, width),
        draw(layers, width, width, **square),
        draw(layers, width),
        draw(layers, width, width, **square),
    )


def _moved(c0: Tensor, *weights: Tensor) -> int:
    return (2 * c0.numel() + sum(w.numel() for w in weights)) * c0.element_size()


def _computed(c0: Tensor, weights: Tensor, *others: Tensor) -> int:
    return 4 * c0.shape[0] * weights.numel()


ONE_LAUNCH = Implementation("triton", "cuda", _triton_allows, _triton_forward, _triton_backward, _outputs)
OPERATOR = Operator(
    "cross_network",
    reference,
    "Tensor c0, Tensor weights, Tensor? biases, Tensor? gates",
    (ONE_LAUNCH,),
    Workload(
        _example,
        tuple({"rows": rows, "width": width, "layers": 3} for rows in (1, 512, 4096, 16384) for width in (32, 100)),
        _moved,
        _computed,
    ),
)
