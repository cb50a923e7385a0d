"""Gated linear attention over jagged histories: what each behaviour reads from the state that its past left."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dispatch import Implementation, Operator, Workload
from kernels.jagged import BLOCK
from kernels.target_layer import geometric_offsets


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    offsets: Tensor,
    state: Tensor | None = None,
    *,
    fused: bool = True,
) -> Tensor:
    """Return o_t = q_t S_t for each behaviour, where S_t = Diag(a_t) S_{t-1} + k_t v_t' within its history.

    No exponent that is ever taken is above 0, so that a state may be forgotten as fast as it likes.

    Args:
        query: q of all histories, oldest first, (T, K).
        key: k, (T, K).
        value: v, (T, D).
        log_decay: log a, none above 0, (T, K).
        offsets: where each history begins, and T at the end, (B + 1,).
        state: S_0 of each history, (B, K, D), as :func:`~kernels.linear_state.linear_state` returns it; None stands
            for 0.
        fused: False computes the definition.

    Returns:
        (T, D).

    Example:
        >>> one, offsets = torch.ones(3, 1), torch.tensor([0, 2, 3])
        >>> linear_attention(one, one, torch.tensor([[1.0], [2.0], [4.0]]), torch.log(one / 2), offsets).T
        tensor([[1.0000, 2.5000, 4.0000]])

    Source: Gated Linear Attention, arXiv 2312.06635.
    """
    return OPERATOR(query, key, value, log_decay, offsets, state, fused=fused)


def recurrence(
    query: Tensor | None, key: Tensor, value: Tensor, log_decay: Tensor, offsets: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return o, (T, D) or nothing without a query, and the last state of each history, (B, K, D), step by step."""
    decay, starts, lengths = log_decay.exp(), offsets[:-1], offsets.diff()
    count = lengths.numel()
    s = value.new_zeros(count, key.shape[1], value.shape[1]) if state is None else state
    read, places = [value[:0]], [starts[:0]]
    for t in range(int(lengths.max()) if count else 0):
        alive = (lengths > t).nonzero().squeeze(1)
        place = starts[alive] + t
        moved = decay[place].unsqueeze(2) * s[alive] + key[place].unsqueeze(2) * value[place].unsqueeze(1)
        s = s.index_copy(0, alive, moved)
        if query is not None:
            read.append((query[place].unsqueeze(1) @ moved).squeeze(1))
            places.append(place)
    back = torch.cat(places).argsort()
    return torch.cat(read)[back], s


def reference(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, offsets: Tensor, state: Tensor | None
) -> Tensor:
    """The definition, in plain torch."""
    return recurrence(query, key, value, log_decay, offsets, state)[0]


class Bucket:
    """Histories of about the same length, padded to a power of 2, on CPU.

    What is padded in is 0: it is read by nothing, adds nothing, and forgets nothing.

    Args:
        rows: the histories' numbers, (R,).
        places: of their behaviours, (R, P), T where there is none.
    """

    def __init__(self, rows: Tensor, places: Tensor) -> None:
        self.rows, self.places = rows, places

    def take(self, values: Tensor) -> Tensor:
        """Return (R, P, .) of (T + 1, .), whose last row is zeros."""
        return values.index_select(0, self.places.reshape(-1)).view(*self.places.shape, values.shape[1])

    def put(self, padded: Tensor, out: Tensor) -> None:
        """Write (R, P, .) to where it belongs in (T + 1, .)."""
        out.index_copy_(0, self.places.reshape(-1), padded.reshape(-1, padded.shape[-1]))


def buckets(offsets: Tensor) -> Iterator[Bucket]:
    """Cut histories into :class:`Bucket` s, empty ones left out, so that little more is padded in than is there."""
    lengths, total = offsets.diff(), int(offsets[-1])
    size, longest = 1, int(lengths.max()) if lengths.numel() else 0
    while size < 2 * longest:
        rows = ((lengths <= size) & (2 * lengths > size)).nonzero().squeeze(1)
        step = torch.arange(size, dtype=offsets.dtype)
        for part in rows.split(max(2 * BLOCK // size, 1)) if rows.numel() else ():
            places = offsets[part].unsqueeze(1) + step
            yield Bucket(part, places.masked_fill_(step >= lengths[part].unsqueeze(1), total))
        size *= 2


def with_zeros(*tensors: Tensor) -> list[Tensor]:
    """Return each with a row of zeros at its end."""
    return [torch.cat((one, one.new_zeros(1, one.shape[1]))) for one in tensors]


def decays(log_decay: Tensor) -> Tensor:
    """Return c_t, the sum of log a over a history's behaviours up to and with t, in doubles, (R, P, K).

    Only differences of it are wanted, which floats would lose in a long history.
    """
    return log_decay.cumsum(1, dtype=torch.float64)


class _Half:
    """One level of a bucket: blocks of 2 h behaviours, of which the later h read what the earlier h left.

    With m the last of the earlier ones, exp(c_i - c_j) = exp(c_i - c_m) exp(c_m - c_j), and neither exponent is
    above 0. Over all levels, each pair of an earlier and a later behaviour is met once.
    """

    def __init__(self, size: int, c: Tensor, query: Tensor, key: Tensor, value: Tensor) -> None:
        self.size = size
        at = self.early(c)[..., -1:, :]
        self.fading = (at - self.early(c)).to(key.dtype).exp_()
        self.faded = (self.late(c) - at).to(key.dtype).exp_()
        self.key, self.query = self.early(key) * self.fading, self.late(query) * self.faded  # (R, n, h, K)
        self.value = self.early(value)
        keys, values = key.shape[-1], value.shape[-1]
        # Three matrices in a row multiply in either order: by h x h scores, or by the state that was left, K x D.
        self.scored = size * (keys + values) <= 2 * keys * values

    def early(self, padded: Tensor) -> Tensor:
        """Return the earlier half of each block, (R, n, h, .)."""
        return padded.unflatten(1, (-1, 2, self.size))[:, :, 0]

    def late(self, padded: Tensor) -> Tensor:
        """Return the later half of each block, (R, n, h, .)."""
        return padded.unflatten(1, (-1, 2, self.size))[:, :, 1]

    def read(self, out: Tensor) -> None:
        """Add what is read to the result, (R, P, D)."""
        if self.scored:
            self.late(out).add_(self.query @ self.key.mT @ self.value)
        else:
            self.late(out).add_(self.query @ (self.key.mT @ self.value))

    def read_backward(self, gradient: Tensor, in_query: Tensor, in_key: Tensor, in_value: Tensor) -> None:
        """Add to the gradients, (R, P, .)."""
        d = self.late(gradient)
        if self.scored:
            of_score = d @ self.value.mT
            of_query, of_key = of_score @ self.key, of_score.mT @ self.query
            of_value = (self.query @ self.key.mT).mT @ d
        else:
            left, of_left = self.key.mT @ self.value, self.query.mT @ d
            of_query, of_key, of_value = d @ left.mT, self.value @ of_left.mT, self.key @ of_left
        self.late(in_query).addcmul_(of_query, self.faded)
        self.early(in_key).addcmul_(of_key, self.fading)
        self.early(in_value).add_(of_value)


def _halves(c: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Iterator[_Half]:
    size = 1
    while size < c.shape[1]:
        yield _Half(size, c, query, key, value)
        size *= 2


def _cpu_forward(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, offsets: Tensor, state: Tensor | None
) -> tuple[Tensor]:
    whole = with_zeros(query, key, value, log_decay)
    out = torch.empty_like(whole[2])
    for bucket in buckets(offsets):
        q, k, v, logs = (bucket.take(one) for one in whole)
        c = decays(logs)
        o = torch.linalg.vecdot(q, k).unsqueeze(2) * v
        for half in _halves(c, q, k, v):
            half.read(o)
        if state is not None:
            o += (q * c.to(q.dtype).exp_()) @ state[bucket.rows]
        bucket.put(o, out)
    # Not a view to autograd: a layer behind may work in place.
    return (torch.ops.aten._unsafe_view(out[:-1], value.shape),)


def _cpu_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, offsets: Tensor,
    state: Tensor | None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    whole = with_zeros(query, key, value, log_decay, gradient)
    into = [torch.empty_like(one) for one in whole[:4]]
    in_state = None if state is None else torch.zeros_like(state)
    for bucket in buckets(offsets):
        q, k, v, logs, d = (bucket.take(one) for one in whole)
        c = decays(logs)
        in_q, in_k, in_v = torch.zeros_like(q), torch.zeros_like(k), torch.linalg.vecdot(q, k).unsqueeze(2) * d
        for half in _halves(c, q, k, v):
            half.read_backward(d, in_q, in_k, in_v)
        if state is not None and in_state is not None:
            left = c.to(q.dtype).exp_()
            in_q.addcmul_(d @ state[bucket.rows].mT, left)
            in_state[bucket.rows] = (q * left).mT @ d
        # c_t only ever stands beside q_t, with a plus, and k_t, with a minus; log a_t is in c_t and all later ones.
        of_c = (in_q * q).addcmul_(in_k, k, value=-1)
        of_own = torch.linalg.vecdot(d, v).unsqueeze(2)  # of q_t k_t, from which c_t is absent
        in_logs = of_c.flip(1).cumsum(1).flip(1)
        for found, place in zip(
            (in_q.addcmul_(of_own, k), in_k.addcmul_(of_own, q), in_v, in_logs), into, strict=True
        ):
            bucket.put(found, place)
    return *(one[:-1] for one in into), None, in_state


@triton.jit
def _forward(
    query, key, value, log_decay, offsets, state, out, last, keys: tl.constexpr, width: tl.constexpr,
    begun: tl.constexpr, reads: tl.constexpr, block_keys: tl.constexpr, block_width: tl.constexpr,
):  # fmt: skip
    """Some columns of a history's state, in registers from its first behaviour to its last."""
    row = tl.program_id(0).to(tl.int64)
    start, end = tl.load(offsets + row).to(tl.int64), tl.load(offsets + row + 1).to(tl.int64)
    unit = tl.arange(0, block_keys)
    column = tl.program_id(1) * block_width + tl.arange(0, block_width)
    place = row * keys * width + unit[:, None] * width + column[None, :]
    own = (unit[:, None] < keys) & (column[None, :] < width)
    s = tl.zeros((block_keys, block_width), tl.float32)
    if begun:
        s += tl.load(state + place, mask=own, other=0.0).to(tl.float32)
    for t in range(start, end):
        at = tl.cast(t, tl.int64)
        k = tl.load(key + at * keys + unit, mask=unit < keys, other=0.0).to(tl.float32)
        a = tl.exp(tl.load(log_decay + at * keys + unit, mask=unit < keys, other=0.0).to(tl.float32))
        v = tl.load(value + at * width + column, mask=column < width, other=0.0).to(tl.float32)
        s = a[:, None] * s + k[:, None] * v[None, :]
        if reads:
            q = tl.load(query + at * keys + unit, mask=unit < keys, other=0.0).to(tl.float32)
            tl.store(out + at * width + column, tl.sum(q[:, None] * s, 0), mask=column < width)
    if not reads:
        tl.store(last + place, s, mask=own)


@triton.jit
def _backward(
    gradient, query, key, value, log_decay, offsets, state, in_query, in_key, in_value, in_logs, in_state,
    keys: tl.constexpr, width: tl.constexpr, begun: tl.constexpr, reads: tl.constexpr,
    block_keys: tl.constexpr, block_width: tl.constexpr,
):  # fmt: skip
    """A history forwards, for the states and the queries' gradients, and backwards, for all others."""
    row = tl.program_id(0).to(tl.int64)
    start, end = tl.load(offsets + row).to(tl.int64), tl.load(offsets + row + 1).to(tl.int64)
    unit, column = tl.arange(0, block_keys), tl.arange(0, block_width)
    place = row * keys * width + unit[:, None] * width + column[None, :]
    own = (unit[:, None] < keys) & (column[None, :] < width)
    s = tl.zeros((block_keys, block_width), tl.float32)
    if begun:
        s += tl.load(state + place, mask=own, other=0.0).to(tl.float32)
    for t in range(start, end):
        at = tl.cast(t, tl.int64)
        k = tl.load(key + at * keys + unit, mask=unit < keys, other=0.0).to(tl.float32)
        a = tl.exp(tl.load(log_decay + at * keys + unit, mask=unit < keys, other=0.0).to(tl.float32))
        v = tl.load(value + at * width + column, mask=column < width, other=0.0).to(tl.float32)
        s = a[:, None] * s + k[:, None] * v[None, :]
        if reads:
            d = tl.load(gradient + at * width + column, mask=column < width, other=0.0).to(tl.float32)
            tl.store(in_query + at * keys + unit, tl.sum(s * d[None, :], 1), mask=unit < keys)
    of_s = tl.zeros((block_keys, block_width), tl.float32)
    of_c = tl.zeros((block_keys,), tl.float32)
    if reads:
        tl.debug_barrier()  # what was written above is read below, by other threads perhaps
    else:
        of_s += tl.load(gradient + place, mask=own, other=0.0).to(tl.float32)
        of_c += tl.sum(of_s * s, 1)
    for step in range(0, end - start):
        at = end - 1 - tl.cast(step, tl.int64)
        k = tl.load(key + at * keys + unit, mask=unit < keys, other=0.0).to(tl.float32)
        a = tl.exp(tl.load(log_decay + at * keys + unit, mask=unit < keys, other=0.0).to(tl.float32))
        v = tl.load(value + at * width + column, mask=column < width, other=0.0).to(tl.float32)
        if reads:
            q = tl.load(query + at * keys + unit, mask=unit < keys, other=0.0).to(tl.float32)
            d = tl.load(gradient + at * width + column, mask=column < width, other=0.0).to(tl.float32)
            of_s += q[:, None] * d[None, :]
            of_c += q * tl.load(in_query + at * keys + unit, mask=unit < keys, other=0.0)
        of_k = tl.sum(of_s * v[None, :], 1)
        of_c -= k * of_k
        tl.store(in_key + at * keys + unit, of_k, mask=unit < keys)
        tl.store(in_value + at * width + column, tl.sum(of_s * k[:, None], 0), mask=column < width)
        tl.store(in_logs + at * keys + unit, of_c, mask=unit < keys)
        of_s *= a[:, None]
    if begun:
        tl.store(in_state + place, of_s, mask=own)


def triton_forward(
    query: Tensor | None, key: Tensor, value: Tensor, log_decay: Tensor, offsets: Tensor, state: Tensor | None
) -> Tensor:
    """Return o, (T, D); without a query the last state of each history, (B, K, D)."""
    rows, (total, keys), width = offsets.numel() - 1, key.shape, value.shape[1]
    key, value, log_decay = key.contiguous(), value.contiguous(), log_decay.contiguous()
    out = value.new_empty((rows, keys, width) if query is None else (total, width))
    block_keys, block_width = triton.next_power_of_2(keys), min(triton.next_power_of_2(width), 32)
    if rows:
        _forward[(rows, triton.cdiv(width, block_width))](
            key if query is None else query.contiguous(), key, value, log_decay, offsets.contiguous(),
            key if state is None else state.contiguous(), out, out, keys, width, state is not None,
            query is not None, block_keys, block_width, num_warps=_warps(block_keys * block_width),
        )  # fmt: skip
    return out


def triton_backward(
    gradient: Tensor, query: Tensor | None, key: Tensor, value: Tensor, log_decay: Tensor, offsets: Tensor,
    state: Tensor | None,
) -> list[Tensor | None]:  # fmt: skip
    """Return the gradients of query, key, value, log_decay and state."""
    rows, keys, width = offsets.numel() - 1, key.shape[1], value.shape[1]
    own = (query, key, value, log_decay, state)
    # Read again by the kernel, and what a history adds up on its way: in floats.
    into = [None if one is None else torch.empty(one.shape, dtype=torch.float32, device=key.device) for one in own]
    in_query, in_key, in_value, in_logs, in_state = into
    block_keys, block_width = triton.next_power_of_2(keys), triton.next_power_of_2(width)
    key = key.contiguous()
    if rows:
        _backward[(rows,)](
            gradient.contiguous(), key if query is None else query.contiguous(), key, value.contiguous(),
            log_decay.contiguous(), offsets.contiguous(), key if state is None else state.contiguous(),
            in_key if in_query is None else in_query, in_key, in_value, in_logs,
            in_key if in_state is None else in_state, keys, width, state is not None, query is not None,
            block_keys, block_width, num_warps=_warps(block_keys * block_width),
        )  # fmt: skip
    return [None if one is None else found.to(one.dtype) for one, found in zip(own, into, strict=True)]  # type: ignore[union-attr]


def _warps(tile: int) -> int:
    # A state of 32 x 32 fits one warp; a step in time must not wait for others.
    return 1 if tile <= 1024 else 4 if tile <= 4096 else 8


def allows(
    kinds: Sequence[torch.dtype], query: Tensor | None, key: Tensor, value: Tensor, log_decay: Tensor,
    offsets: Tensor, state: Tensor | None, largest: int | None = None,
) -> bool:  # fmt: skip
    """Whether all are of one of these types and fit each other, and a state has ``largest`` numbers at most."""
    if key.dim() != 2 or value.dim() != 2 or not key.shape[1] or not value.shape[1]:
        return False
    (total, keys), width = key.shape, value.shape[1]
    return (
        key.dtype in kinds
        and all(one is None or one.dtype == key.dtype for one in (query, value, log_decay, state))
        and log_decay.shape == key.shape
        and len(value) == total
        and (query is None or query.shape == key.shape)
        and offsets.dim() == 1
        and (state is None or state.shape == (offsets.numel() - 1, keys, width))
        and (largest is None or triton.next_power_of_2(keys) * triton.next_power_of_2(width) <= largest)
    )


TRITON_KINDS = (torch.float32, torch.bfloat16, torch.float16)
CPU_KINDS = (torch.float32, torch.float64)
LARGEST_STATE = 16384
"""Numbers of a history's state that a Triton program holds."""


def _triton_allows(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, offsets: Tensor, state: Tensor | None
) -> bool:
    return allows(TRITON_KINDS, query, key, value, log_decay, offsets, state, LARGEST_STATE)


def _cpu_allows(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, offsets: Tensor, state: Tensor | None
) -> bool:
    return allows(CPU_KINDS, query, key, value, log_decay, offsets, state)


def _triton_forward(*arguments: Any) -> tuple[Tensor]:
    return (triton_forward(*arguments),)


def _triton_backward(gradient: Tensor, *arguments: Any) -> tuple[Tensor | None, ...]:
    *found, in_state = triton_backward(gradient, *arguments)
    return *found, None, in_state


def _cpu_worth(_query: Tensor, key: Tensor, *_others: Tensor | None) -> bool:
    return len(key) >= 64


def _outputs(query: Tensor, key: Tensor, value: Tensor, *rest: Tensor | None) -> tuple[Tensor]:
    return (torch.empty_like(value, memory_format=torch.contiguous_format),)


def example(
    generator: torch.Generator, device: str, dtype: torch.dtype, *, rows: int, width: int, mean: int = 30
) -> tuple[Tensor, ...]:
    """Return query, key, value, log_decay, offsets and state of ``rows`` histories, K = D = ``width``."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    offsets = geometric_offsets(generator, rows, mean)
    total = int(offsets[-1])
    log_decay = torch.nn.functional.logsigmoid(torch.randn(total, width, generator=generator) + 2).to(device, dtype)
    query, key = draw(total, width) * width**-0.5, draw(total, width)
    return query, key, draw(total, width), log_decay, offsets.to(device), draw(rows, width, width)


def _moved(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, offsets: Tensor, state: Tensor | None
) -> int:
    numbers = 3 * key.numel() + 2 * value.numel() + (0 if state is None else state.numel())
    return numbers * key.element_size() + 8 * offsets.numel()


def _computed(query: Tensor, key: Tensor, value: Tensor, *rest: Tensor | None) -> int:
    return 5 * value.numel() * key.shape[1]


OPERATOR = Operator(
    "linear_attention",
    reference,
    "Tensor query, Tensor key, Tensor value, Tensor log_decay, Tensor offsets, Tensor? state",
    (
        Implementation("triton", "cuda", _triton_allows, _triton_forward, _triton_backward, _outputs),
        Implementation("cpu", "cpu", _cpu_allows, _cpu_forward, _cpu_backward, worth=_cpu_worth),
    ),
    Workload(
        example,
        tuple({"rows": rows, "width": width} for rows in (1, 512, 16384) for width in (16, 64)),
        _moved,
        _computed,
    ),
)
