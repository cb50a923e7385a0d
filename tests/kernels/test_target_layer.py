from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from kernels import target_layer
from kernels.jagged import rows_of
from kernels.target_layer import OPERATOR
from tests.kernels.conformance import conforms, examples, jagged

LENGTHS = st.lists(st.sampled_from([0, 0, 1, 2, 3, 33, 70]), max_size=7)


def arguments(dtype: torch.dtype, lengths: list[int], width: int, hidden: int):
    _, _, query, weight, bias = examples(OPERATOR, dtype, rows=max(len(lengths), 1), width=width, hidden=hidden)
    return *jagged(lengths, width, dtype), query[: len(lengths)], weight, bias


def test_it_is_the_layer_on_the_concatenation() -> None:
    values, offsets, query, weight, bias = arguments(torch.float64, [3, 0, 1, 6], 4, 5)
    q = query[rows_of(offsets, 10)]
    expected = F.linear(torch.cat((q, values, q - values, q * values), 1), weight, bias)
    torch.testing.assert_close(target_layer(values, offsets, query, weight, bias), expected)


@pytest.mark.parametrize(
    ("name", "dtype"), [("triton", torch.float32), ("triton", torch.bfloat16), ("cpu", torch.float32)]
)
@given(lengths=LENGTHS, width=st.integers(1, 40), hidden=st.integers(1, 90))
@example(lengths=[], width=3, hidden=4)
@example(lengths=[0, 0], width=3, hidden=4)
@example(lengths=[1, 2000, 0, 70], width=5, hidden=7)
@settings(max_examples=5, phases=[Phase.explicit, Phase.generate])
def test_every_implementation(name, dtype, lengths, width, hidden) -> None:
    one = next(one for one in OPERATOR.implementations if one.name == name)
    conforms(OPERATOR, one, arguments(dtype, lengths, width, hidden))


def test_a_batch_of_4097_rows_on_cpu() -> None:
    one = next(one for one in OPERATOR.implementations if one.name == "cpu")
    conforms(OPERATOR, one, arguments(torch.float32, [n % 3 for n in range(4097)], 9, 11))


def test_more_rows_than_programs(monkeypatch) -> None:
    one = next(one for one in OPERATOR.implementations if one.name == "triton")
    monkeypatch.setitem(one.backward.__globals__, "_PROGRAMS", 2)
    conforms(OPERATOR, one, arguments(torch.float32, [3, 0, 40, 1, 7], 5, 6))


def test_a_matrix_too_large_for_registers_is_not_taken() -> None:
    triton = OPERATOR.implementations[0]
    assert triton.allows(*arguments(torch.float32, [2], 64, 80))
    assert not triton.allows(*arguments(torch.float32, [2], 64, 200))


def test_gradients() -> None:
    values, offsets, query, weight, bias = arguments(torch.float64, [2, 0, 1], 3, 2)
    given_ = tuple(v.requires_grad_() for v in (values, query, weight, bias))
    assert OPERATOR.chosen(values, offsets, query, weight, bias) == "cpu"
    assert torch.autograd.gradcheck(lambda v, q, w, b: target_layer(v, offsets, q, w, b), given_)
