from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from kernels import linear_attention, linear_state
from kernels.linear_state import OPERATOR
from tests.kernels.conformance import conforms
from tests.kernels.test_linear_attention import LENGTHS, arguments


def test_it_is_what_the_last_behaviour_reads() -> None:
    q, *rest, offsets, state = arguments(torch.float64, [3, 7], 2, 4)
    last = offsets[1:] - 1
    read = (q[last].unsqueeze(1) @ linear_state(*rest, offsets, state)).squeeze(1)
    torch.testing.assert_close(read, linear_attention(q, *rest, offsets, state)[last])


@pytest.mark.parametrize("one", OPERATOR.implementations, ids=lambda one: one.name)
@given(cuts=st.lists(st.integers(0, 6), min_size=3, max_size=3))
@settings(max_examples=2, phases=[Phase.explicit, Phase.generate])
def test_step_by_step_is_the_whole(one, cuts) -> None:
    _, k, v, log_decay, offsets, state = arguments(torch.float32, [6, 9, 0], 2, 3)
    (whole,) = one.forward(k, v, log_decay, offsets, state)
    lengths = offsets.diff()
    first = torch.minimum(torch.tensor(cuts), lengths)
    place = torch.arange(15) - offsets[:-1].repeat_interleave(lengths)
    early = place < first.repeat_interleave(lengths)
    for part, counts in ((early, first), (~early, lengths - first)):
        (state,) = one.forward(k[part], v[part], log_decay[part], torch.cat((offsets[:1], counts.cumsum(0))), state)
    torch.testing.assert_close(state, whole)


@pytest.mark.parametrize(
    ("name", "dtype"), [("triton", torch.float32), ("triton", torch.bfloat16), ("cpu", torch.float32)]
)
@given(lengths=LENGTHS, keys=st.integers(1, 20), width=st.integers(1, 40), begun=st.booleans())
@example(lengths=[], keys=3, width=4, begun=True)
@example(lengths=[0, 0], keys=3, width=4, begun=True)
@settings(max_examples=3, phases=[Phase.explicit, Phase.generate])
def test_every_implementation(name, dtype, lengths, keys, width, begun) -> None:
    one = next(one for one in OPERATOR.implementations if one.name == name)
    begun = begun or not any(lengths)  # the definition has no gradient where nothing is added to nothing
    conforms(OPERATOR, one, arguments(dtype, lengths, keys, width, begun=begun)[1:])


@pytest.mark.parametrize("name", ["triton", "cpu"])
def test_a_history_of_2000(name) -> None:
    one = next(one for one in OPERATOR.implementations if one.name == name)
    conforms(OPERATOR, one, arguments(torch.float32, [1, 2000, 0], 3, 5)[1:])


def test_a_batch_of_4097_histories_on_cpu() -> None:
    one = next(one for one in OPERATOR.implementations if one.name == "cpu")
    conforms(OPERATOR, one, arguments(torch.float32, [n % 6 for n in range(4097)], 4, 3)[1:])


@pytest.mark.parametrize("one", OPERATOR.implementations, ids=lambda one: one.name)
@pytest.mark.parametrize("speed", [0, 0.01, 1e5])
def test_long_histories_and_all_or_nothing_forgotten(one, speed) -> None:
    longest = 2000 if one.name == "cpu" else 40  # the interpreter is slow
    conforms(OPERATOR, one, arguments(torch.float32, [longest, 1, 5], 3, 2, speed=speed)[1:])


def test_gradients() -> None:
    _, k, v, log_decay, offsets, state = arguments(torch.float64, [5, 0, 2], 2, 3)
    assert OPERATOR.chosen(k, v, log_decay, offsets, state) == "cpu"
    given_ = tuple(one.requires_grad_() for one in (k, v, log_decay, state))
    assert torch.autograd.gradcheck(lambda k, v, a, s: linear_state(k, v, a, offsets, s), given_)
