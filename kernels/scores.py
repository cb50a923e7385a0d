"""A linear layer over the candidates of users: what a user shares with all its candidates is multiplied once."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from kernels.dispatch import Implementation, Operator, Workload, product_type
from kernels.jagged import rows_of, segment_sum
from kernels.product import product, summed_product


def shared_linear(
    shared: Tensor,
    own: Tensor,
    offsets: Tensor,
    of_shared: Tensor,
    of_own: Tensor,
    bias: Tensor | None = None,
    *,
    fused: bool = True,
) -> Tensor:
    """Return y_n = W_u u + W_i x_n + b for each candidate x_n of a user u.

    That is W [u, x_n] + b with W cut into [W_u, W_i], of which the first product is taken once a user, not once a
    candidate.

    Args:
        shared: the users u, (U, C).
        own: the candidates x of all users, one user after the other, (N, D).
        offsets: where each user's candidates begin, and N at the end, (U + 1,).
        of_shared: W_u, (H, C).
        of_own: W_i, (H, D).
        bias: b, (H,); None stands for 0.
        fused: False computes the definition.

    Returns:
        (N, H).

    Example:
        >>> users, candidates = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.1], [0.2], [0.3]])
        >>> shared_linear(users, candidates, torch.tensor([0, 2, 3]), torch.ones(1, 1), torch.ones(1, 1)).T
        tensor([[1.1000, 1.2000, 2.3000]])
    """
    return OPERATOR(shared, own, offsets, of_shared, of_own, bias, fused=fused)


def reference(
    shared: Tensor, own: Tensor, offsets: Tensor, of_shared: Tensor, of_own: Tensor, bias: Tensor | None
) -> Tensor:
    """The definition, in plain torch."""
    asked = F.linear(shared, of_shared, bias)  # (U, H)
    if asked.shape[0] == 1:
        return F.linear(own, of_own, asked[0])  # to its candidates, a single user is a bias
    return F.linear(own, of_own) + asked[rows_of(offsets, own.shape[0])]


def _cpu_forward(
    shared: Tensor, own: Tensor, offsets: Tensor, of_shared: Tensor, of_own: Tensor, bias: Tensor | None
) -> tuple[Tensor]:
    asked = product(shared, of_shared, bias)  # (U, H)
    if len(asked) == 1:
        return (product(own, of_own, asked[0]),)
    return (product(own, of_own).add_(asked.index_select(0, rows_of(offsets, own.shape[0]))),)


def _cpu_backward(
    gradient: Tensor, shared: Tensor, own: Tensor, offsets: Tensor, of_shared: Tensor, of_own: Tensor,
    bias: Tensor | None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    return _gradients(gradient, segment_sum(gradient, offsets), shared, own, of_shared, of_own, bias)


def _gradients(
    gradient: Tensor, asked: Tensor, shared: Tensor, own: Tensor, of_shared: Tensor, of_own: Tensor,
    bias: Tensor | None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Return one gradient an argument, from that of the result, (N, H), and its sum over each user, (U, H)."""
    return (
        asked @ of_shared,
        gradient @ of_own,
        None,
        summed_product(asked, shared),
        summed_product(gradient, own),
        None if bias is None else asked.sum(0),
    )


@triton.jit
def _forward(
    own, weight, asked, users, out, rows, width: tl.constexpr, size: tl.constexpr, product: tl.constexpr,
    block_rows: tl.constexpr, block_size: tl.constexpr, block_inner: tl.constexpr,
):  # fmt: skip
    """Some candidates by some units: their product, to which each adds what its user has."""
    row = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    unit = tl.program_id(1) * block_size + tl.arange(0, block_size)
    there, wanted = row < rows, unit < size
    user = tl.load(users + row, mask=there, other=0).to(tl.int64)
    y = tl.load(asked + user[:, None] * size + unit[None, :], mask=there[:, None] & wanted[None, :], other=0.0)
    y = y.to(tl.float32)
    for start in range(0, width, block_inner):
        k = start + tl.arange(0, block_inner)
        inner = k < width
        x = tl.load(
            own + row[:, None].to(tl.int64) * width + k[None, :], mask=there[:, None] & inner[None, :], other=0.0
        )
        w = tl.load(weight + unit[None, :] * width + k[:, None], mask=wanted[None, :] & inner[:, None], other=0.0)
        y = tl.dot(x.to(product), w.to(product), y, input_precision="ieee")
    place = row[:, None].to(tl.int64) * size + unit[None, :]
    tl.store(out + place, y, mask=there[:, None] & wanted[None, :])


@triton.jit
def _user_sums(gradient, offsets, out, size: tl.constexpr, block: tl.constexpr, block_size: tl.constexpr):
    """The sum of some units over the candidates of a user, in their order."""
    user = tl.program_id(0)
    unit, step = tl.program_id(1) * block_size + tl.arange(0, block_size), tl.arange(0, block)
    start, end = tl.load(offsets + user).to(tl.int64), tl.load(offsets + user + 1).to(tl.int64)
    total = tl.zeros((block_size,), tl.float32)
    for at in range(start, end, block):
        n = at + step
        g = tl.load(
            gradient + n[:, None] * size + unit[None, :],
            mask=(n[:, None] < end) & (unit[None, :] < size),
            other=0.0,
        )
        total += tl.sum(g.to(tl.float32), 0)
    tl.store(out + user.to(tl.int64) * size + unit, total, mask=unit < size)


def _triton_forward(
    shared: Tensor, own: Tensor, offsets: Tensor, of_shared: Tensor, of_own: Tensor, bias: Tensor | None
) -> tuple[Tensor]:
    asked = F.linear(shared, of_shared, bias)  # (U, H)
    (rows, width), size = own.shape, of_own.shape[0]
    out = own.new_empty(rows, size)
    if rows:
        block_inner = min(64, max(16, triton.next_power_of_2(width)))
        _forward[(triton.cdiv(rows, 64), triton.cdiv(size, 64))](
            own.contiguous(), of_own.contiguous(), asked, rows_of(offsets, rows), out, rows, width, size,
            product_type(own.dtype), 64, 64, block_inner,
        )  # fmt: skip
    return (out,)


def _triton_backward(
    gradient: Tensor, shared: Tensor, own: Tensor, offsets: Tensor, of_shared: Tensor, of_own: Tensor,
    bias: Tensor | None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    users, size = len(shared), of_own.shape[0]
    asked = torch.empty(users, size, dtype=torch.float32, device=own.device)
    if users:
        _user_sums[(users, triton.cdiv(size, 64))](gradient.contiguous(), offsets.contiguous(), asked, size, 32, 64)
    return _gradients(gradient, asked.to(own.dtype), shared, own, of_shared, of_own, bias)


def _fits(
    shared: Tensor, own: Tensor, offsets: Tensor, of_shared: Tensor, of_own: Tensor, bias: Tensor | None
) -> bool:
    """Whether all are of one floating type, and of the shapes that the function names."""
    return (
        shared.dim() == own.dim() == of_shared.dim() == of_own.dim() == 2
        and offsets.shape == (len(shared) + 1,)
        and of_shared.shape[1] == shared.shape[1]
        and of_own.shape == (len(of_shared), own.shape[1])
        and shared.dtype == own.dtype == of_shared.dtype == of_own.dtype
        and (bias is None or (bias.shape == of_own.shape[:1] and bias.dtype == own.dtype))
    )


def _triton_allows(shared: Tensor, *others: Any) -> bool:
    return shared.dtype in (torch.float32, torch.bfloat16, torch.float16) and _fits(shared, *others)


def _cpu_allows(shared: Tensor, *others: Any) -> bool:
    return shared.dtype in (torch.float32, torch.float64) and _fits(shared, *others)


def _outputs(shared: Tensor, own: Tensor, offsets: Tensor, of_shared: Tensor, *others: Any) -> tuple[Tensor]:
    return (own.new_empty(len(own), len(of_shared)),)


def _example(
    generator: torch.Generator, device: str, dtype: torch.dtype,
    *, users: int, each: int, shared: int, own: int, hidden: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    def draw(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*size, generator=generator) * scale).to(device, dtype)

    scale = max(1, shared + own) ** -0.5
    return (
        draw(users, shared),
        draw(users * each, own),
        torch.arange(0, users * each + 1, each).to(device) if each else torch.zeros(users + 1, dtype=torch.long),
        draw(hidden, shared, scale=scale),
        draw(hidden, own, scale=scale),
        draw(hidden),
    )


def _moved(shared: Tensor, own: Tensor, offsets: Tensor, of_shared: Tensor, of_own: Tensor, bias: Tensor) -> int:
    read = sum(t.numel() for t in (shared, own, of_shared, of_own, bias))
    return (read + own.shape[0] * of_own.shape[0]) * own.element_size() + 8 * offsets.numel()


def _computed(shared: Tensor, own: Tensor, offsets: Tensor, of_shared: Tensor, of_own: Tensor, bias: Tensor) -> int:
    return 2 * (len(shared) * of_shared.numel() + len(own) * of_own.numel())


OPERATOR = Operator(
    "scores",
    reference,
    "Tensor shared, Tensor own, Tensor offsets, Tensor of_shared, Tensor of_own, Tensor? bias",
    (
        Implementation("triton", "cuda", _triton_allows, _triton_forward, _triton_backward, _outputs),
        Implementation("cpu", "cpu", _cpu_allows, _cpu_forward, _cpu_backward),
    ),
    Workload(
        _example,
        tuple(
            {"users": users, "each": each, "shared": 496, "own": 144, "hidden": 400}
            for users, each in ((1, 500), (1, 2000), (32, 500))
        ),
        _moved,
        _computed,
    ),
)
