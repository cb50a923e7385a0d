from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from kernels import linear_attention
from kernels.linear_attention import OPERATOR
from tests.kernels.conformance import conforms, jagged

LENGTHS = st.lists(st.sampled_from([0, 0, 1, 2, 3, 9, 17]), max_size=4)


def arguments(
    dtype: torch.dtype, lengths: list[int], keys: int, width: int, *, begun: bool = True, speed: float = 1
) -> tuple[Tensor | None, ...]:
    """Query, key, value, log_decay, offsets, state; the larger ``speed``, the faster is forgotten."""
    drawn, offsets = jagged(lengths, 3 * keys + width, torch.float64)
    query, key, logits, value = drawn.split((keys, keys, keys, width), 1)
    state = torch.randn(len(lengths), keys, width, generator=torch.Generator().manual_seed(4)).to(dtype)
    log_decay = speed * F.logsigmoid(logits + 2)
    query, key, value, log_decay = (
        one.to(dtype).contiguous() for one in (query / keys**0.5, key, value, log_decay)
    )
    return query, key, value, log_decay, offsets, state if begun else None


def test_it_is_the_recurrence() -> None:
    q, k, v, log_decay, offsets, state = arguments(torch.float64, [3, 0, 5], 2, 4)
    expected = []
    for row in range(3):
        s = state[row]
        for t in range(int(offsets[row]), int(offsets[row + 1])):
            s = torch.diag(log_decay[t].exp()) @ s + torch.outer(k[t], v[t])
            expected.append(q[t] @ s)
    for fused in (False, True):
        found = linear_attention(q, k, v, log_decay, offsets, state, fused=fused)
        torch.testing.assert_close(found, torch.stack(expected))


@pytest.mark.parametrize(
    ("name", "dtype"), [("triton", torch.float32), ("triton", torch.bfloat16), ("cpu", torch.float32)]
)
@given(lengths=LENGTHS, keys=st.integers(1, 20), width=st.integers(1, 40), begun=st.booleans())
@example(lengths=[], keys=3, width=4, begun=True)
@example(lengths=[0, 0], keys=3, width=4, begun=True)
@settings(max_examples=3, phases=[Phase.explicit, Phase.generate])
def test_every_implementation(name, dtype, lengths, keys, width, begun) -> None:
    one = next(one for one in OPERATOR.implementations if one.name == name)
    conforms(OPERATOR, one, arguments(dtype, lengths, keys, width, begun=begun))


@pytest.mark.parametrize("one", OPERATOR.implementations, ids=lambda one: one.name)
@pytest.mark.parametrize("speed", [0.01, 1])
def test_long_histories(one, speed) -> None:
    longest = 2000 if one.name == "cpu" else 40  # the interpreter is slow
    conforms(OPERATOR, one, arguments(torch.float32, [longest, 1, 5], 3, 2, speed=speed))


@pytest.mark.parametrize("one", OPERATOR.implementations, ids=lambda one: one.name)
@pytest.mark.parametrize("speed", [0, 100, 1e5])
def test_all_or_nothing_is_forgotten(one, speed) -> None:
    conforms(OPERATOR, one, arguments(torch.float32, [17, 0, 3], 5, 4, speed=speed))


@pytest.mark.parametrize("name", ["triton", "cpu"])
def test_a_history_of_2000(name) -> None:
    one = next(one for one in OPERATOR.implementations if one.name == name)
    conforms(OPERATOR, one, arguments(torch.float32, [1, 2000, 0], 3, 5))


def test_a_batch_of_4097_histories_on_cpu() -> None:
    one = next(one for one in OPERATOR.implementations if one.name == "cpu")
    conforms(OPERATOR, one, arguments(torch.float32, [n % 6 for n in range(4097)], 4, 3))


def test_gradients() -> None:
    q, k, v, log_decay, offsets, state = arguments(torch.float64, [5, 0, 2], 2, 3)
    assert OPERATOR.chosen(q, k, v, log_decay, offsets, state) == "cpu"
    given_ = tuple(one.requires_grad_() for one in (q, k, v, log_decay, state))
    assert torch.autograd.gradcheck(lambda q, k, v, a, s: linear_attention(q, k, v, a, offsets, s), given_)
