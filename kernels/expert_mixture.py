"""Layers of K experts side by side: each on its own, or weighed by a gate and summed; those not chosen left out."""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from kernels.dispatch import Implementation, Operator, Workload, product_type
from kernels.product import product, summed_product

Activation = Literal["none", "relu"]


def expert_layer(
    x: Tensor, gates: Tensor, weight: Tensor, bias: Tensor, *,
    activation: Activation = "none", sparse: bool = False, fused: bool = True,
) -> Tensor:  # fmt: skip
    """Return what each expert makes of its input, y_k = f(x_k W_k + b_k).

    Args:
        x: input of each expert, (B, K, I), or one for all of them, (B, I).
        gates: weights of the experts, (B, K); only whether they are 0 matters here, and only if ``sparse``.
        weight: W, (K, I, O).
        bias: b, (K, O).
        activation: f, ``none`` or ``relu``.
        sparse: leave experts of weight 0 out: their y is 0 and has no gradient.
        fused: False computes the definition.

    Returns:
        (B, K, O).

    Example:
        >>> x, weight, bias = torch.tensor([[1.0], [2.0]]), torch.tensor([[[3.0]], [[4.0]]]), torch.zeros(2, 1)
        >>> expert_layer(x, torch.eye(2), weight, bias, sparse=True).flatten(1)
        tensor([[3., 0.],
                [0., 8.]])

    Source: arXiv 1701.06538.
    """
    return OPERATOR(x, gates, weight, bias, activation, False, sparse, fused=fused)


def expert_mixture(
    x: Tensor, gates: Tensor, weight: Tensor, bias: Tensor, *, sparse: bool = False, fused: bool = True
) -> Tensor:
    """Return the last layer of a mixture, sum_k g_k (x_k W_k + b_k), without laying out what each expert says.

    Args:
        x: last hidden layer of each expert, (B, K, I), or one input for all of them, (B, I).
        gates: g, weights of the experts, (B, K).
        weight: W, (K, I, O).
        bias: b, (K, O).
        sparse: leave experts of weight 0 out: not even their weight has a gradient. That is right for gates that
            choose, such as top-k; not for those whose exact zeros have one, such as a straight-through choice.
        fused: False computes the definition.

    Returns:
        (B, O).

    Example:
        >>> x, weight, bias = torch.tensor([[1.0], [2.0]]), torch.tensor([[[3.0]], [[4.0]]]), torch.ones(2, 1)
        >>> expert_mixture(x, torch.tensor([[0.5, 0.5], [0.0, 1.0]]), weight, bias)
        tensor([[4.5000],
                [9.0000]])

    Source: arXiv 1701.06538.
    """
    return OPERATOR(x, gates, weight, bias, "none", True, sparse, fused=fused)


def reference(
    x: Tensor, gates: Tensor, weight: Tensor, bias: Tensor, activation: str, mixed: bool, sparse: bool
) -> Tensor:
    """The definition, in plain torch."""
    y = torch.einsum("bi,kio->bko" if x.dim() == 2 else "bki,kio->bko", x, weight) + bias  # (B, K, O)
    y = F.relu(y) if activation == "relu" else y
    y = y * (gates != 0).unsqueeze(2) if sparse else y
    return torch.bmm(gates.unsqueeze(1).to(y.dtype), y).squeeze(1) if mixed else y


@triton.jit
def _each(
    x, weight, bias, order, counts, out, positive_out, rows,
    experts: tl.constexpr, inner: tl.constexpr, outer: tl.constexpr,
    step_inner: tl.constexpr, step_outer: tl.constexpr,
    shared: tl.constexpr, grouped: tl.constexpr, biased: tl.constexpr, relu: tl.constexpr, product: tl.constexpr,
    block_rows: tl.constexpr, block_inner: tl.constexpr, block_outer: tl.constexpr,
):  # fmt: skip
    """A tile of one expert's output, over the rows that chose it, which ``order`` lists first. The steps read W."""
    expert = tl.program_id(2)
    first = tl.program_id(0) * block_rows
    place = first + tl.arange(0, block_rows)
    walked = inner
    if grouped:
        count = tl.load(counts + expert)
        own = place < count
        row = tl.load(order + expert.to(tl.int64) * rows + place, mask=own, other=0).to(tl.int64)
        walked = tl.where(first < count, inner, 0)  # nobody chose it: no step at all
    else:
        own = place < rows
        row = place.to(tl.int64)
    o = tl.program_id(1) * block_outer + tl.arange(0, block_outer)
    source = row if shared else row * experts + expert
    said = tl.zeros((block_rows, block_outer), tl.float32)
    for start in range(0, walked, block_inner):
        i = start + tl.arange(0, block_inner)
        tile = tl.load(
            x + source[:, None] * inner + i[None, :], mask=own[:, None] & (i[None, :] < inner), other=0.0
        )
        within = (i[:, None] < inner) & (o[None, :] < outer)
        at = expert * inner * outer + i[:, None] * step_inner + o[None, :] * step_outer
        w = tl.load(weight + at, mask=within, other=0.0)
        said = tl.dot(tile.to(product), w.to(product), said, input_precision="ieee")
    if biased:
        said += tl.load(bias + expert * outer + o, mask=o < outer, other=0.0).to(tl.float32)[None, :]
    at = (row * experts + expert)[:, None] * outer + o[None, :]
    within = own[:, None] & (o[None, :] < outer)
    if relu:
        tl.store(positive_out + at, (said > 0).to(tl.uint8), mask=within)
        said = tl.maximum(said, 0.0)
    tl.store(out + at, said, mask=within)


@triton.jit
def _mixed(
    x, gates, weight, bias, out, rows, experts: tl.constexpr, inner: tl.constexpr, outer: tl.constexpr,
    step_inner: tl.constexpr, step_outer: tl.constexpr, shared: tl.constexpr, biased: tl.constexpr,
    product: tl.constexpr, block_rows: tl.constexpr, block_inner: tl.constexpr, block_outer: tl.constexpr,
):  # fmt: skip
    """A tile of the mixture: each expert is weighed as its product ends; one that no row chose is skipped."""
    row = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    own = row < rows
    row = row.to(tl.int64)
    o = tl.program_id(1) * block_outer + tl.arange(0, block_outer)
    total = tl.zeros((block_rows, block_outer), tl.float32)
    for expert in range(experts):
        g = tl.load(gates + row * experts + expert, mask=own, other=0.0).to(tl.float32)
        walked = tl.where(tl.max(tl.abs(g), axis=0) > 0, inner, 0)
        source = row if shared else row * experts + expert
        said = tl.zeros((block_rows, block_outer), tl.float32)
        for start in range(0, walked, block_inner):
            i = start + tl.arange(0, block_inner)
            read = own[:, None] & (i[None, :] < inner)
            tile = tl.load(x + source[:, None] * inner + i[None, :], mask=read, other=0.0)
            within = (i[:, None] < inner) & (o[None, :] < outer)
            at = expert * inner * outer + i[:, None] * step_inner + o[None, :] * step_outer
            w = tl.load(weight + at, mask=within, other=0.0)
            said = tl.dot(tile.to(product), w.to(product), said, input_precision="ieee")
        if biased:
            said += tl.load(bias + expert * outer + o, mask=o < outer, other=0.0).to(tl.float32)[None, :]
        total += said * g[:, None]
    tl.store(out + row[:, None] * outer + o[None, :], total, mask=own[:, None] & (o[None, :] < outer))


@triton.jit
def _mixed_backward(
    gradient, x, gates, weight, bias, x_out, gates_out, rows,
    experts: tl.constexpr, inner: tl.constexpr, outer: tl.constexpr,
    shared: tl.constexpr, sparse: tl.constexpr, product: tl.constexpr,
    block_rows: tl.constexpr, block_inner: tl.constexpr, block_outer: tl.constexpr,
):  # fmt: skip
    """Some rows of one expert: t = gradient W_k' gives that of x_k, g_k t, and of g_k, x_k . t + b_k . gradient."""
    expert = tl.program_id(1)
    row = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    own = row < rows
    row = row.to(tl.int64)
    g = tl.load(gates + row * experts + expert, mask=own, other=0.0).to(tl.float32)
    walked = outer
    if sparse:
        walked = tl.where(tl.max(tl.abs(g), axis=0) > 0, outer, 0)
    of_gate = tl.zeros((block_rows,), tl.float32)
    for start in range(0, walked, block_outer):
        o = start + tl.arange(0, block_outer)
        d = tl.load(
            gradient + row[:, None] * outer + o[None, :], mask=own[:, None] & (o[None, :] < outer), other=0.0
        )
        b = tl.load(bias + expert * outer + o, mask=o < outer, other=0.0).to(tl.float32)
        of_gate += tl.sum(d.to(tl.float32) * b[None, :], axis=1)
    source = row if shared else row * experts + expert
    for begin in range(0, inner, block_inner):
        i = begin + tl.arange(0, block_inner)
        t = tl.zeros((block_rows, block_inner), tl.float32)
        for start in range(0, walked, block_outer):
            o = start + tl.arange(0, block_outer)
            read = own[:, None] & (o[None, :] < outer)
            d = tl.load(gradient + row[:, None] * outer + o[None, :], mask=read, other=0.0)
            within = (i[None, :] < inner) & (o[:, None] < outer)
            w = tl.load(weight + (expert * inner + i[None, :]) * outer + o[:, None], mask=within, other=0.0)
            t = tl.dot(d.to(product), w.to(product), t, input_precision="ieee")
        within = own[:, None] & (i[None, :] < inner)
        of_gate += tl.sum(
            t * tl.load(x + source[:, None] * inner + i[None, :], mask=within, other=0.0).to(tl.float32), axis=1
        )
        tl.store(x_out + (row * experts + expert)[:, None] * inner + i[None, :], t * g[:, None], mask=within)
    if sparse:
        of_gate = tl.where(g == 0, 0.0, of_gate)
    tl.store(gates_out + row * experts + expert, of_gate, mask=own)


def _block(size: int) -> int:
    return min(64, max(16, triton.next_power_of_2(size)))


def _triton_forward(
    x: Tensor, gates: Tensor, weight: Tensor, bias: Tensor, activation: str, mixed: bool, sparse: bool
) -> tuple[Tensor, Tensor]:
    x, gates, weight, bias = x.contiguous(), gates.contiguous(), weight.contiguous(), bias.contiguous()
    if mixed:
        return _launch_mixed(x, gates, weight, bias), x.new_empty(0, dtype=torch.uint8)
    return _launch_each(x, gates, weight, bias, activation == "relu", sparse)


def _launch_mixed(x: Tensor, gates: Tensor, weight: Tensor, bias: Tensor | None, *, back: bool = False) -> Tensor:
    """Return sum_k g_k (x_k W_k + b_k), with W' if ``back``."""
    rows, experts = gates.shape
    _, inner, outer = weight.mT.shape if back else weight.shape
    out = x.new_empty(rows, outer)
    if rows:
        block_outer = _block(outer)
        _mixed[(triton.cdiv(rows, 32), triton.cdiv(outer, block_outer))](
            x, gates, weight, x if bias is None else bias, out, rows, experts, inner, outer,
            *((1, inner) if back else (outer, 1)), x.dim() == 2, bias is not None, product_type(x.dtype),
            32, _block(inner), block_outer,
        )  # fmt: skip
    return out


def _launch_each(
    x: Tensor, gates: Tensor, weight: Tensor, bias: Tensor | None, relu: bool, sparse: bool, *, back: bool = False
) -> tuple[Tensor, Tensor]:
    """Return f(x_k W_k + b_k), with W' if ``back``, and where f's argument was positive."""
    rows, experts = gates.shape
    _, inner, outer = weight.mT.shape if back else weight.shape
    # Grouped by expert without asking the device how many there are: those that chose it first, in their order.
    order = counts = gates
    if sparse:
        chosen = gates != 0
        order = torch.sort((~chosen).T.contiguous(), dim=1, stable=True).indices  # (K, B)
        counts = chosen.sum(0)
    out = (x.new_zeros if sparse else x.new_empty)(rows, experts, outer)
    positive = torch.zeros_like(out, dtype=torch.uint8) if relu else out.new_empty(0, dtype=torch.uint8)
    if rows:
        block_outer = _block(outer)
        _each[(triton.cdiv(rows, 32), triton.cdiv(outer, block_outer), experts)](
            x, weight, x if bias is None else bias, order, counts, out, positive, rows, experts, inner, outer,
            *((1, inner) if back else (outer, 1)), x.dim() == 2, sparse, bias is not None, relu,
            product_type(x.dtype), 32, _block(inner), block_outer,
        )  # fmt: skip
    return out, positive


def _triton_backward(
    gradient: Tensor, x: Tensor, gates: Tensor, weight: Tensor, bias: Tensor,
    activation: str, mixed: bool, sparse: bool, positive: Tensor,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    gradient, x, gates = gradient.contiguous(), x.contiguous(), gates.contiguous()
    weight, bias, shared = weight.contiguous(), bias.contiguous(), x.dim() == 2
    experts, inner, outer = weight.shape
    each = x.unsqueeze(0).expand(experts, -1, -1) if shared else x.transpose(0, 1)  # (K, B, I)
    if mixed:
        rows = len(x)
        of_x, of_gates = x.new_empty(rows, experts, inner), torch.empty_like(gates)
        if rows:
            _mixed_backward[(triton.cdiv(rows, 32), experts)](
                gradient, x, gates, weight, bias, of_x, of_gates, rows, experts, inner, outer,
                shared, sparse, product_type(x.dtype), 32, _block(inner), _block(outer),
            )  # fmt: skip
        weighed = gates.T.unsqueeze(2) * gradient  # (K, B, O)
        return (
            of_x.sum(1) if shared else of_x,
            of_gates,
            torch.bmm(each.mT, weighed),
            weighed.sum(1),
            None,
            None,
            None,
        )
    if activation == "relu":
        gradient = gradient * positive
    if sparse:
        gradient = gradient * (gates != 0).unsqueeze(2)
    if shared:
        chosen = (gates != 0).to(x.dtype) if sparse else torch.ones_like(gates)
        of_x = _launch_mixed(gradient, chosen, weight, None, back=True)
    else:
        of_x, _ = _launch_each(gradient, gates, weight, None, False, sparse, back=True)
    return of_x, None, torch.bmm(each.mT, gradient.transpose(0, 1)), gradient.sum(0), None, None, None


def _cpu_forward(
    x: Tensor, gates: Tensor, weight: Tensor, bias: Tensor, activation: str, mixed: bool, sparse: bool
) -> tuple[Tensor, Tensor]:
    experts, _, outer = weight.shape
    if x.dim() == 2 and not mixed and not sparse:
        wide = product(x, _wide(weight), bias.flatten())
        # Not a view to autograd: a layer behind may work in place.
        return _kept(torch.ops.aten._unsafe_view(wide, (len(x), experts, outer)), activation)
    out = x.new_zeros((len(x), outer) if mixed else (len(x), experts, outer))
    for k, rows in enumerate(_choosers(gates, sparse)):
        said = product(_taken(x if x.dim() == 2 else x[:, k], rows), weight[k].T, bias[k])
        if not mixed:
            _put(out[:, k], rows, said)
        elif rows is None:
            out.addcmul_(said, gates[:, k : k + 1])
        else:
            out.index_add_(0, rows, said.mul_(gates[rows, k].unsqueeze(1)))
    return _kept(out, activation)


def _cpu_backward(
    gradient: Tensor, x: Tensor, gates: Tensor, weight: Tensor, bias: Tensor,
    activation: str, mixed: bool, sparse: bool, out: Tensor,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    experts, inner, outer = weight.shape
    shared = x.dim() == 2
    if shared and not mixed and not sparse:
        d = (gradient * (out > 0) if activation == "relu" else gradient).reshape(len(x), -1)  # (B, K O)
        of_weight = summed_product(x, d).view(inner, experts, outer).transpose(0, 1)
        of_bias = d.sum(0).view(experts, outer)
        return product(d, _wide(weight).T), None, of_weight.contiguous(), of_bias, None, None, None
    of_x, of_weight, of_bias = torch.zeros_like(x), torch.zeros_like(weight), torch.zeros_like(bias)
    of_gates = torch.zeros_like(gates) if mixed else None
    for k, rows in enumerate(_choosers(gates, sparse)):
        own = _taken(x if shared else x[:, k], rows)
        d = _taken(gradient if mixed else gradient[:, k], rows)
        if activation == "relu":
            d = d * (_taken(out[:, k], rows) > 0)
        back = product(d, weight[k])  # of x_k, before it is weighed
        if of_gates is not None:
            weights = _taken(gates[:, k], rows).unsqueeze(1)
            _put(of_gates[:, k], rows, (back * own).sum(1).addmv_(d, bias[k]))
            d, back = d * weights, back.mul_(weights)
        if shared:
            of_x = of_x.add_(back) if rows is None else of_x.index_add_(0, rows, back)
        else:
            _put(of_x[:, k], rows, back)
        of_weight[k] = summed_product(own, d)
        torch.sum(d, 0, out=of_bias[k])
    return of_x, of_gates, of_weight, of_bias, None, None, None


def _kept(out: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Return the result, and what the backward needs of it: where it was positive."""
    return (out.relu_(), out) if activation == "relu" else (out, out.new_empty(0))


def _wide(weight: Tensor) -> Tensor:
    """Return the weights of one layer that holds all experts side by side, (K O, I)."""
    return weight.transpose(1, 2).reshape(-1, weight.shape[1])


def _choosers(gates: Tensor, sparse: bool) -> list[Tensor | None]:
    """Return for each expert the rows of weight other than 0; None for all rows."""
    if not sparse:
        return [None] * gates.shape[1]
    lists = [own.nonzero().squeeze(1) for own in (gates != 0).T.contiguous()]
    return [None if len(rows) == len(gates) else rows for rows in lists]


def _taken(values: Tensor, rows: Tensor | None) -> Tensor:
    return values if rows is None else values.index_select(0, rows)


def _put(to: Tensor, rows: Tensor | None, values: Tensor) -> None:
    if rows is None:
        to.copy_(values)
    else:
        to.index_copy_(0, rows, values)  # on views, several times as fast as index_add_


def _fits(x: Tensor, gates: Tensor, weight: Tensor, bias: Tensor, activation: str, mixed: bool) -> bool:
    """Whether all are of one floating type and fit each other, and there is no activation before the sum."""
    return (
        x.dim() in (2, 3)
        and activation in (("none",) if mixed else ("none", "relu"))
        and weight.dim() == 3
        and x.shape[1:] in ((weight.shape[1],), weight.shape[:2])
        and gates.shape == (len(x), len(weight))
        and bias.shape == (len(weight), weight.shape[2])
        and x.dtype == gates.dtype == weight.dtype == bias.dtype
    )


def _triton_allows(
    x: Tensor, gates: Tensor, weight: Tensor, bias: Tensor, activation: str, mixed: bool, sparse: bool
) -> bool:
    floats = (torch.float32, torch.bfloat16, torch.float16)
    return x.dtype in floats and _fits(x, gates, weight, bias, activation, mixed)


def _cpu_allows(
    x: Tensor, gates: Tensor, weight: Tensor, bias: Tensor, activation: str, mixed: bool, sparse: bool
) -> bool:
    return x.dtype in (torch.float32, torch.float64) and _fits(x, gates, weight, bias, activation, mixed)


def _cpu_worth(x: Tensor, _gates: Tensor, weight: Tensor, *_others: object) -> bool:
    experts, inner, _outer = weight.shape
    return len(x) * experts * inner >= 2**17


def _outputs(
    x: Tensor, gates: Tensor, weight: Tensor, bias: Tensor, activation: str, mixed: bool, sparse: bool
) -> tuple[Tensor, Tensor]:
    out = x.new_empty((len(x), weight.shape[2]) if mixed else (len(x), *bias.shape))
    return out, x.new_empty(out.shape if activation == "relu" and not mixed else 0, dtype=torch.uint8)


def _example(
    generator: torch.Generator, device: str, dtype: torch.dtype,
    *, rows: int, experts: int, inner: int, outer: int,
    top: int = 0, shared: int = 0, mixed: int = 1, relu: int = 0,
) -> tuple[object, ...]:  # fmt: skip
    def draw(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(size, generator=generator) * scale).to(device, dtype)

    x = draw(rows, inner) if shared else draw(rows, experts, inner)
    logits = torch.randn(rows, experts, generator=generator)
    if top:
        logits = logits.masked_fill(logits < logits.topk(top, dim=1).values[:, -1:], -torch.inf)
    gates = logits.softmax(1).to(device, dtype)
    weight = draw(experts, inner, outer, scale=inner**-0.5)
    return x, gates, weight, draw(experts, outer), "relu" if relu else "none", bool(mixed), top > 0


def _moved(
    x: Tensor, gates: Tensor, weight: Tensor, bias: Tensor, activation: str, mixed: bool, sparse: bool
) -> int:
    out = len(x) * weight.shape[2] * (1 if mixed else len(weight))
    return (sum(t.numel() for t in (x, gates, weight, bias)) + out) * x.element_size()


def _computed(
    x: Tensor, gates: Tensor, weight: Tensor, bias: Tensor, activation: str, mixed: bool, sparse: bool
) -> int:
    pairs = int(gates.count_nonzero()) if sparse else gates.numel()
    return 2 * pairs * weight[0].numel()


OPERATOR = Operator(
    "expert_mixture",
    reference,
    "Tensor x, Tensor gates, Tensor weight, Tensor bias, str activation, bool mixed, bool sparse",
    (
        Implementation("triton", "cuda", _triton_allows, _triton_forward, _triton_backward, _outputs, returns=2),
        Implementation("cpu", "cpu", _cpu_allows, _cpu_forward, _cpu_backward, worth=_cpu_worth),
    ),
    Workload(
        _example,
        tuple(
            {"rows": rows, "experts": experts, "top": top, **layer}
            for layer in (
                {"inner": 624, "outer": 200, "shared": 1, "mixed": 0, "relu": 1},
                {"inner": 200, "outer": 80, "shared": 0, "mixed": 1, "relu": 0},
            )
            for rows in (512, 4096, 16384)
            for experts, top in ((4, 0), (8, 2))
        ),
        _moved,
        _computed,
    ),
)
