from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from kernels.expert_mixture import OPERATOR, expert_layer, expert_mixture
from tests.kernels.conformance import conforms, examples

EVERY = pytest.mark.parametrize("one", OPERATOR.implementations, ids=lambda one: one.name)
MIXED = pytest.mark.parametrize("mixed", [0, 1])
SHARED = pytest.mark.parametrize("shared", [0, 1])
FEW = settings(max_examples=6, phases=[Phase.explicit, Phase.generate])


@st.composite
def sizes(draw, rows: int, layers_are_sparse: bool):
    experts, mixed = draw(st.integers(1, 4)), draw(st.integers(0, 1))
    return {
        "rows": draw(st.integers(0, rows)),
        "experts": experts,
        "inner": draw(st.integers(1, 70)),
        "outer": draw(st.integers(1, 70)),
        "top": draw(st.integers(int(layers_are_sparse and not mixed), experts)),
        "shared": draw(st.integers(0, 1)),
        "mixed": mixed,
        "relu": 0 if mixed else draw(st.integers(0, 1)),
    }


@pytest.mark.parametrize("top", [0, 2])
@SHARED
def test_it_is_the_weighed_sum_of_its_experts(shared: int, top: int) -> None:
    x, gates, weight, bias, *_ = examples(
        OPERATOR, torch.float64, rows=5, experts=3, inner=4, outer=2, shared=shared, top=top
    )
    each = [((x if shared else x[:, k]) @ weight[k] + bias[k]) for k in range(3)]
    expected = sum(gates[:, k : k + 1] * said for k, said in enumerate(each))
    torch.testing.assert_close(expert_mixture(x, gates, weight, bias, sparse=top > 0), expected)
    layer = expert_layer(x, gates, weight, bias, activation="relu", sparse=top > 0)
    for k, said in enumerate(each):
        chosen = gates[:, k : k + 1] != 0
        torch.testing.assert_close(layer[:, k], torch.where(chosen, said.relu(), 0.0) if top else said.relu())
    assert (gates == 0).any() == (top > 0)


def test_experts_that_are_not_chosen_are_not_computed() -> None:
    x, gates, weight, bias, *_ = examples(OPERATOR, torch.float32, rows=6, experts=3, inner=4, outer=2, shared=1)
    gates[:, 1] = 0
    weight[1] = torch.nan
    assert expert_mixture(x, gates, weight, bias, sparse=True).isfinite().all()
    layer = expert_layer(x, gates, weight, bias, sparse=True)
    assert layer.isfinite().all() and not layer[:, 1].any()


def test_a_choice_whose_zeros_have_a_gradient_keeps_it_unless_sparse() -> None:
    x, gates, weight, bias, *_ = examples(OPERATOR, torch.float64, rows=6, experts=3, inner=4, outer=2, top=1)
    gates.requires_grad_()
    (dense,) = torch.autograd.grad(expert_mixture(x, gates, weight, bias).sum(), gates)
    (sparse,) = torch.autograd.grad(expert_mixture(x, gates, weight, bias, sparse=True).sum(), gates)
    assert dense.all()
    torch.testing.assert_close(sparse, dense * (gates != 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(own=sizes(rows=70, layers_are_sparse=False))
@FEW
def test_triton(dtype, own) -> None:
    conforms(OPERATOR, OPERATOR.implementations[0], examples(OPERATOR, dtype, **own))


@given(own=sizes(rows=4097, layers_are_sparse=True))
@FEW
def test_cpu(own) -> None:
    conforms(OPERATOR, OPERATOR.implementations[1], examples(OPERATOR, torch.float32, **own))


@EVERY
@MIXED
@SHARED
def test_every_form(one, mixed: int, shared: int) -> None:
    for top, relu in [(0, 1 - mixed), (1, 1 - mixed), (2, 0)]:
        form = {"mixed": mixed, "shared": shared, "top": top, "relu": relu}
        arguments = examples(OPERATOR, torch.float32, rows=35, experts=3, inner=5, outer=4, **form)
        conforms(OPERATOR, one, arguments)


@EVERY
@MIXED
def test_saturated_gates(one, mixed: int) -> None:
    """All rows choose the same expert."""
    x, _, *others = examples(OPERATOR, torch.float32, rows=40, experts=3, inner=5, outer=4, mixed=mixed, top=1)
    conforms(OPERATOR, one, (x, torch.eye(3)[[2] * 40], *others))


@MIXED
@SHARED
@pytest.mark.parametrize("top", [0, 2])
def test_gradients(mixed: int, shared: int, top: int) -> None:
    sizes = {"rows": 3, "experts": 3, "inner": 2, "outer": 2, "shared": shared, "mixed": mixed, "top": top}
    *values, activation, mix, _ = examples(OPERATOR, torch.float64, **sizes)
    x, gates, weight, bias = (v.requires_grad_() for v in values)
    assert OPERATOR.chosen(*values, activation, mix, top > 0) == "cpu"
    # A finite difference would choose what was not chosen.
    watched = (x, weight, bias) if top else (x, gates, weight, bias)
    assert torch.autograd.gradcheck(
        lambda *a: OPERATOR(*((a[0], gates.detach(), *a[1:]) if top else a), activation, mix, top > 0), watched
    )
