from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from kernels.target_attention import ActivatedLayer, padded, target_attention
from tests.kernels.conformance import jagged

LENGTHS, D, HIDDEN = [3, 0, 1, 6, 0, 2], 4, (8, 5)


def inputs(kind: str, prior: bool) -> list[Tensor | None]:
    """Behaviours, candidates, prior, then weight, bias and alpha of each layer."""
    torch.manual_seed(0)
    sizes = (*HIDDEN, 1)
    drawn = [
        torch.randn(sum(LENGTHS), D),
        torch.randn(len(LENGTHS), D),
        torch.randn(sum(LENGTHS)) if prior else None,
    ]
    drawn += [torch.randn(sizes[0], 4 * D) / 4, torch.randn(sizes[0])]
    for inner, outer in pairwise(sizes):
        drawn += [torch.randn(outer, inner) / inner**0.5, torch.randn(outer), torch.randn(inner)]
    return [None if v is None else v.double().requires_grad_() for v in drawn]


def call(function, kind: str, drawn: list[Tensor | None], trained: bool, **options) -> Tensor:
    values, query, prior, weight, bias, *rest = drawn
    layers = []
    for place in range(0, len(rest), 3):
        w, b, alpha = rest[place : place + 3]
        layer = ActivatedLayer(w, b, kind)
        if kind == "dice":
            known = {} if trained else {"mean": 0.1 * torch.ones_like(alpha), "rate": 2 * torch.ones_like(alpha)}
            layer = layer._replace(alpha=alpha, **known)
        layers.append(layer)
    offsets = jagged(LENGTHS, 1, torch.float64)[1]
    return function(values, offsets, query, (weight, bias), layers, prior, **options)


@pytest.mark.parametrize(("softmax", "prior"), [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize(("kind", "trained"), [("dice", True), ("dice", False), ("sigmoid", True), ("relu", True)])
def test_it_is_the_padded_network_with_the_same_gradients(kind, trained, softmax, prior) -> None:
    drawn = inputs(kind, prior)
    wanted = [
        v for place, v in enumerate(drawn) if v is not None and (kind == "dice" or place < 5 or place % 3 != 1)
    ]
    weight = torch.randn(len(LENGTHS), D, dtype=torch.float64)
    expected = call(padded, kind, drawn, trained, longest=9, softmax=softmax)
    slopes = torch.autograd.grad((expected * weight).sum(), wanted)
    found = call(target_attention, kind, drawn, trained, softmax=softmax)
    torch.testing.assert_close(found, expected)
    for one, other in zip(torch.autograd.grad((found * weight).sum(), wanted), slopes, strict=True):
        torch.testing.assert_close(one, other)


def test_the_definitions_give_the_same() -> None:
    drawn = inputs("dice", True)
    fused = call(target_attention, "dice", drawn, True)
    torch.testing.assert_close(call(target_attention, "dice", drawn, True, fused=False), fused)


def test_no_behaviour_at_all() -> None:
    query, weight, alpha = (torch.ones(*shape, requires_grad=True) for shape in ((3, D), (1, 4 * D), (1,)))
    layer = ActivatedLayer(torch.ones(1, 1), None, "dice", alpha)
    nothing = torch.empty(0, D), torch.zeros(4, dtype=torch.int64)
    pooled = target_attention(*nothing, query, (weight, torch.zeros(1)), [layer], softmax=True)
    assert torch.equal(pooled, torch.zeros(3, D))
    slopes = torch.autograd.grad(pooled.sum(), (query, weight, alpha))
    assert all(not slope.any() for slope in slopes)
