from __future__ import annotations

import itertools

import torch

from ctr_models.layers import InnerProducts, pairwise


def test_pairwise_is_the_sum_over_pairs() -> None:
    e = torch.randn(5, 4, 3, dtype=torch.float64)
    expected = sum((e[:, i] * e[:, j]).sum(1) for i, j in itertools.combinations(range(4), 2))
    torch.testing.assert_close(pairwise(e.flatten(1), e.shape[2]), expected)


def test_inner_products_are_those_of_all_pairs_in_order() -> None:
    e = torch.randn(5, 4, 3, dtype=torch.float64)
    layer = InnerProducts(4)
    expected = torch.stack([(e[:, i] * e[:, j]).sum(1) for i, j in itertools.combinations(range(4), 2)], dim=1)
    torch.testing.assert_close(layer(e), expected)
    torch.testing.assert_close(layer(e).sum(1), pairwise(e.flatten(1), e.shape[2]))
    assert layer.width == 6


def test_it_keeps_nothing_that_a_checkpoint_would_hold() -> None:
    assert not InnerProducts(4).state_dict()
