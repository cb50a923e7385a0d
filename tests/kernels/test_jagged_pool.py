from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from kernels import jagged_pool
from kernels.jagged_pool import OPERATOR
from tests.kernels.conformance import conforms, jagged

LENGTHS = st.lists(st.sampled_from([0, 0, 1, 2, 3, 33, 70]), max_size=7)


def arguments(dtype: torch.dtype, lengths: list[int], width: int, softmax: bool, prior: bool):
    values, offsets = jagged(lengths, width, dtype)
    scores, other = jagged(lengths, 2, dtype, seed=3)[0].T.contiguous()
    return values, scores, offsets, other if prior else None, softmax


@pytest.mark.parametrize("softmax", [False, True])
def test_it_is_the_equation(softmax) -> None:
    lengths = [3, 0, 1, 6]
    values, scores, offsets, prior, _ = arguments(torch.float64, lengths, 4, softmax, True)
    weights = [w.softmax(0) if softmax else w for w in (scores + prior).split(lengths)]
    expected = torch.stack([w @ v for w, v in zip(weights, values.split(lengths), strict=True)])
    torch.testing.assert_close(jagged_pool(values, scores, offsets, prior, softmax=softmax), expected)


@pytest.mark.parametrize(
    ("name", "dtype"), [("triton", torch.float32), ("triton", torch.bfloat16), ("cpu", torch.float32)]
)
@given(lengths=LENGTHS, width=st.integers(1, 40), softmax=st.booleans(), prior=st.booleans())
@example(lengths=[], width=3, softmax=True, prior=False)
@example(lengths=[0, 0], width=3, softmax=True, prior=True)
@example(lengths=[1, 2000, 0, 70], width=5, softmax=True, prior=True)
@settings(max_examples=6, phases=[Phase.explicit, Phase.generate])
def test_every_implementation(name, dtype, lengths, width, softmax, prior) -> None:
    one = next(one for one in OPERATOR.implementations if one.name == name)
    conforms(OPERATOR, one, arguments(dtype, lengths, width, softmax, prior))


@pytest.mark.parametrize("softmax", [False, True])
def test_a_batch_of_4097_histories_on_cpu(softmax) -> None:
    one = next(one for one in OPERATOR.implementations if one.name == "cpu")
    conforms(OPERATOR, one, arguments(torch.float32, [n % 6 for n in range(4097)], 7, softmax, True))


@pytest.mark.parametrize("one", OPERATOR.implementations, ids=lambda one: one.name)
def test_large_scores(one) -> None:
    values, scores, offsets, _, _ = arguments(torch.float32, [3, 0, 40], 4, True, False)
    conforms(OPERATOR, one, (values, scores * 1e4, offsets, None, True))


def test_scores_wider_than_values() -> None:
    values, scores, offsets, *_ = arguments(torch.bfloat16, [3, 0, 40], 4, True, False)
    triton = OPERATOR.implementations[0]
    result, *_ = triton.forward(values, scores.float(), offsets, None, True)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, OPERATOR.reference(values, scores.float(), offsets, None, True))


@pytest.mark.parametrize("softmax", [False, True])
def test_gradients(softmax) -> None:
    values, scores, offsets, prior, _ = arguments(torch.float64, [2, 0, 3], 3, softmax, True)
    assert OPERATOR.chosen(values, scores, offsets, prior, softmax) == "cpu"
    given_ = tuple(v.requires_grad_() for v in (values, scores, prior))
    assert torch.autograd.gradcheck(lambda v, s, p: jagged_pool(v, s, offsets, p, softmax=softmax), given_)
