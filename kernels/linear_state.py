"""The state that a history leaves, from the one that it found: gated linear attention for a user, step by step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.dispatch import Implementation, Operator, Workload
from kernels.linear_attention import (
    CPU_KINDS,
    LARGEST_STATE,
    TRITON_KINDS,
    allows,
    buckets,
    decays,
    example,
    recurrence,
    triton_backward,
    triton_forward,
    with_zeros,
)


def linear_state(
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    offsets: Tensor,
    state: Tensor | None = None,
    *,
    fused: bool = True,
) -> Tensor:
    """Return the last S_t = Diag(a_t) S_{t-1} + k_t v_t' of each history.

    Its size does not grow with the history, so that it can be kept for a user and moved on by new behaviours: the
    state after all is that after the new ones, begun with that after the old. A candidate reads it as q S.

    Args:
        key: k of all histories, oldest first, (T, K).
        value: v, (T, D).
        log_decay: log a, none above 0, (T, K).
        offsets: where each history begins, and T at the end, (B + 1,).
        state: S_0 of each history, (B, K, D); None stands for 0.
        fused: False computes the definition.

    Returns:
        (B, K, D); S_0 for an empty history.

    Example:
        >>> k, half, v = torch.ones(3, 1), torch.log(torch.full((3, 1), 0.5)), torch.tensor([[1.0], [2.0], [4.0]])
        >>> before = linear_state(k[:2], v[:2], half[:2], torch.tensor([0, 2]))
        >>> linear_state(k[2:], v[2:], half[2:], torch.tensor([0, 1]), before)
        tensor([[[5.2500]]])
        >>> linear_state(k, v, half, torch.tensor([0, 3]))
        tensor([[[5.2500]]])

    Source: Gated Linear Attention, arXiv 2312.06635.
    """
    return OPERATOR(key, value, log_decay, offsets, state, fused=fused)


def reference(key: Tensor, value: Tensor, log_decay: Tensor, offsets: Tensor, state: Tensor | None) -> Tensor:
    """The definition, in plain torch."""
    return recurrence(None, key, value, log_decay, offsets, state)[1]


def _cpu_forward(
    key: Tensor, value: Tensor, log_decay: Tensor, offsets: Tensor, state: Tensor | None
) -> tuple[Tensor]:
    shape = offsets.numel() - 1, key.shape[1], value.shape[1]
    out = value.new_zeros(shape) if state is None else state.clone()
    whole = with_zeros(key, value, log_decay)
    for bucket in buckets(offsets):
        k, v, logs = (bucket.take(one) for one in whole)
        c = decays(logs)
        left = (k * (c[:, -1:] - c).to(k.dtype).exp_()).mT @ v  # (R, K, D)
        if state is not None:
            left.addcmul_(c[:, -1].to(k.dtype).exp_().unsqueeze(2), state[bucket.rows])
        out[bucket.rows] = left
    return (out,)


def _cpu_backward(
    gradient: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, offsets: Tensor, state: Tensor | None
) -> tuple[Tensor | None, ...]:
    whole = with_zeros(key, value, log_decay)
    into = [torch.empty_like(one) for one in whole]
    in_state = None if state is None else gradient.clone()
    for bucket in buckets(offsets):
        k, v, logs = (bucket.take(one) for one in whole)
        c, d = decays(logs), gradient[bucket.rows]
        fading = (c[:, -1:] - c).to(k.dtype).exp_()
        in_k = (v @ d.mT).mul_(fading)
        in_v = fading.mul_(k) @ d
        # log a_t fades all that came before t: what is left of that is in k dk, and in the state at the beginning.
        of_past = in_k * k
        of_past = of_past.cumsum(1) - of_past
        if state is not None and in_state is not None:
            whole_fading = c[:, -1].to(k.dtype).exp_().unsqueeze(2)
            in_state[bucket.rows] = d * whole_fading
            of_past += (d * whole_fading * state[bucket.rows]).sum(2).unsqueeze(1)
        for found, place in zip((in_k, in_v, of_past), into, strict=True):
            bucket.put(found, place)
    return *(one[:-1] for one in into), None, in_state


def _triton_forward(*arguments: Any) -> tuple[Tensor]:
    return (triton_forward(None, *arguments),)


def _triton_backward(gradient: Tensor, *arguments: Any) -> tuple[Tensor | None, ...]:
    _, *found, in_state = triton_backward(gradient, None, *arguments)
    return *found, None, in_state


def _triton_allows(key: Tensor, value: Tensor, log_decay: Tensor, offsets: Tensor, state: Tensor | None) -> bool:
    return allows(TRITON_KINDS, None, key, value, log_decay, offsets, state, LARGEST_STATE)


def _cpu_allows(key: Tensor, value: Tensor, log_decay: Tensor, offsets: Tensor, state: Tensor | None) -> bool:
    return allows(CPU_KINDS, None, key, value, log_decay, offsets, state)


def _cpu_worth(key: Tensor, *_others: Tensor | None) -> bool:
    return len(key) >= 64


def _outputs(key: Tensor, value: Tensor, log_decay: Tensor, offsets: Tensor, state: Tensor | None) -> tuple[Tensor]:
    return (value.new_empty(offsets.numel() - 1, key.shape[1], value.shape[1]),)


def _example(
    generator: torch.Generator, device: str, dtype: torch.dtype, *, rows: int, width: int, mean: int = 30
) -> tuple[Tensor, ...]:
    return example(generator, device, dtype, rows=rows, width=width, mean=mean)[1:]


def _moved(key: Tensor, value: Tensor, log_decay: Tensor, offsets: Tensor, state: Tensor | None) -> int:
    states = (offsets.numel() - 1) * key.shape[1] * value.shape[1] * (1 if state is None else 2)
    return (2 * key.numel() + value.numel() + states) * key.element_size() + 8 * offsets.numel()


def _computed(key: Tensor, value: Tensor, *rest: Tensor | None) -> int:
    return 3 * value.numel() * key.shape[1]


OPERATOR = Operator(
    "linear_state",
    reference,
    "Tensor key, Tensor value, Tensor log_decay, Tensor offsets, Tensor? state",
    (
        Implementation("triton", "cuda", _triton_allows, _triton_forward, _triton_backward, _outputs),
        Implementation("cpu", "cpu", _cpu_allows, _cpu_forward, _cpu_backward, worth=_cpu_worth),
    ),
    Workload(
        _example,
        tuple({"rows": rows, "width": width} for rows in (1, 512, 16384) for width in (16, 64)),
        _moved,
        _computed,
    ),
)
