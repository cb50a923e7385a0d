from __future__ import annotations

import pytest
import torch

from ctr_models.errors import ConfigError
from ctr_models.layers import BilinearFusion


def test_first_logits_are_of_order_one_for_every_number_of_heads() -> None:
    torch.manual_seed(0)
    o1, o2 = torch.randn(2000, 400), torch.randn(2000, 200)
    for heads in (1, 5, 50):
        fusion = BilinearFusion(400, 200, heads=heads)
        assert fusion.weight.std().item() == pytest.approx((2 / (400 * 200 / heads + 1)) ** 0.5, rel=0.1)
        assert 0.5 < fusion(o1, o2).std().item() < 4


def test_heads_divide_the_bilinear_parameters() -> None:
    def count(heads: int) -> int:
        return sum(p.numel() for p in BilinearFusion(40, 20, heads=heads).parameters())

    assert count(1) == 40 * 20 + 40 + 20 + 1
    assert count(5) == 40 * 20 // 5 + 40 + 20 + 1


def test_one_bilinear_matrix_with_blocks_on_its_diagonal_is_the_same() -> None:
    torch.manual_seed(0)
    fusion, whole = BilinearFusion(6, 4, heads=2), BilinearFusion(6, 4, heads=1)
    state = {**fusion.state_dict(), "weight": torch.block_diag(*fusion.weight).unsqueeze(0)}
    whole.load_state_dict(state)
    o1, o2 = torch.randn(5, 6), torch.randn(5, 4)
    torch.testing.assert_close(fusion(o1, o2), whole(o1, o2))


def test_heads_that_do_not_divide_name_those_that_do() -> None:
    with pytest.raises(ConfigError, match=r"heads: 3 heads don't divide streams of 8 and 12. one of \[1, 2, 4\]"):
        BilinearFusion(8, 12, heads=3)
