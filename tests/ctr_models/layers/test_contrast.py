from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from ctr_models.layers.contrast import contrastive_loss, hard_shares, masked_view, spread

OFFSETS = torch.tensor([0, 400, 400, 401, 1000], dtype=torch.int32)
VALUES = torch.arange(1000.0).unsqueeze(1)


def test_a_view_keeps_the_wanted_share_in_order_and_in_its_row() -> None:
    torch.manual_seed(0)
    values, offsets = masked_view(VALUES, OFFSETS, 0.3)
    assert offsets.dtype == OFFSETS.dtype
    assert len(values) == offsets[-1]
    assert 0.6 < len(values) / len(VALUES) < 0.8
    flat = values.squeeze(1)
    assert (flat.diff() > 0).all()
    for row, (start, stop) in enumerate(zip(OFFSETS.tolist(), OFFSETS[1:].tolist(), strict=False)):
        own = flat[offsets[row] : offsets[row + 1]]
        assert ((own >= start) & (own < stop)).all()
    again, _ = masked_view(VALUES, OFFSETS, 0.3)
    assert not torch.equal(again, values)


def test_a_view_never_loses_a_whole_history() -> None:
    values, offsets = masked_view(VALUES, OFFSETS, 1 - 1e-12)
    assert offsets.diff().tolist() == [1, 0, 1, 1]
    assert len(values) == 3


def test_a_view_of_nothing() -> None:
    values, offsets = masked_view(torch.empty(0, 4), torch.zeros(3, dtype=torch.int64), 0.5)
    assert values.shape == (0, 4)
    assert offsets.tolist() == [0, 0, 0]


def test_a_view_can_leave_random_numbers_as_they_are() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    one, other = (masked_view(VALUES, OFFSETS, 0.3, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(one[0], other[0])
    assert torch.equal(torch.get_rng_state(), state)


def test_each_behaviour_may_have_its_own_chance() -> None:
    share = torch.zeros(1000)
    share[::2] = 0.5
    values, offsets = masked_view(VALUES, OFFSETS, share)
    left = set(values.flatten().int().tolist())
    assert left >= set(range(1, 1000, 2))
    assert 650 < len(left) < 850
    assert len(left) == offsets[-1]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.5, 0.8])
def test_the_behaviours_that_count_most_are_hard(share: float) -> None:
    torch.manual_seed(0)
    attention = torch.rand(1000)
    found = hard_shares(attention, OFFSETS, share)
    among = min(1.0, 2 * share)
    for start, stop in zip(OFFSETS.tolist(), OFFSETS[1:].tolist(), strict=False):
        top = attention[start:stop].argsort(descending=True)[: math.ceil(round(among * (stop - start), 9))]
        expected = torch.zeros(stop - start)
        if share:
            expected[top] = share / among
        torch.testing.assert_close(found[start:stop], expected)
    assert float(found.mean()) == pytest.approx(share, abs=0.002)  # about as many as at random


def test_no_behaviours_are_not_hard() -> None:
    assert hard_shares(torch.empty(0), torch.zeros(3, dtype=torch.int32), 0.3).shape == (0,)


def naive(one: torch.Tensor, other: torch.Tensor, user: list[int], temperature: float) -> float:
    total = 0.0
    for i in range(len(one)):
        e = {
            k: math.exp(float(F.cosine_similarity(one[i], other[k], dim=0)) / temperature)
            for k in range(len(one))
            if k == i or user[k] != user[i] or user[i] == 0
        }
        total -= math.log(e[i] / sum(e.values()))
    return total / len(one)


@pytest.mark.parametrize("user", [[1, 2, 3, 4, 5], [1, 2, 1, 1, 2], [0, 0, 3, 0, 3]])
def test_it_is_its_equation_without_rows_of_the_same_user(user: list[int]) -> None:
    torch.manual_seed(0)
    one, other = torch.randn(5, 3), torch.randn(5, 3)
    found = contrastive_loss(one, other, torch.tensor(user), temperature=0.5)
    assert float(found) == pytest.approx(naive(one, other, user, 0.5), rel=1e-5)


def test_lengths_of_the_outputs_do_not_count() -> None:
    torch.manual_seed(0)
    one, other, user = torch.randn(6, 3), torch.randn(6, 3), torch.arange(1, 7)
    torch.testing.assert_close(
        contrastive_loss(100 * one, other, user, temperature=0.1),
        contrastive_loss(one, other, user, temperature=0.1),
    )


def test_learning_by_it_tells_rows_apart() -> None:
    torch.manual_seed(0)
    weight = torch.randn(8, 4, requires_grad=True)
    rows, user = torch.randn(32, 8), torch.arange(1, 33)
    optimizer = torch.optim.Adam([weight], lr=0.05)

    def loss() -> torch.Tensor:
        views = [(rows + 0.05 * torch.randn_like(rows)) @ weight for _ in range(2)]
        return contrastive_loss(*views, user, temperature=0.1)

    before = loss().item()
    for _ in range(60):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss().item() < 0.7 * before


@pytest.mark.parametrize("rows", [0, 1])
def test_without_others_there_is_nothing_to_tell_apart(rows: int) -> None:
    one = torch.ones(rows, 3, requires_grad=True)
    loss = contrastive_loss(one, one, torch.ones(rows, dtype=torch.int64), temperature=0.1)
    assert loss.item() == 0
    loss.backward()
    assert not one.grad.any()


def test_an_output_of_zeros_has_a_finite_gradient() -> None:
    one = torch.zeros(4, 3, requires_grad=True)
    contrastive_loss(one, torch.randn(4, 3), torch.arange(1, 5), temperature=0.1).backward()
    assert one.grad.isfinite().all()


@pytest.mark.parametrize("user", [[1, 2, 3, 4, 5], [1, 2, 1, 1, 2], [0, 0, 3, 0, 3]])
def test_the_spread_is_its_equation(user: list[int]) -> None:
    torch.manual_seed(0)
    g, one, other = torch.randn(5, 3), torch.randn(5, 3), torch.randn(5, 3)
    unit = F.normalize(g, dim=1)
    far, near = [], []
    for i in range(5):
        for k in range(5):
            if i != k and user[i] == user[k] != 0:
                near.append(float(unit[i] @ unit[k]))
            elif i != k:
                far.append(math.exp(-2 * float((unit[i] - unit[k]).square().sum())))
    found = spread(g, one, other, torch.tensor(user))
    assert found["uniformity"] == pytest.approx(-math.log(sum(far) / len(far)), rel=1e-5)
    assert ("tolerance" in found) == bool(near)
    if near:
        assert found["tolerance"] == pytest.approx(sum(near) / len(near), rel=1e-5)
    assert found["alignment"] == pytest.approx(float(F.cosine_similarity(one, other).mean()), rel=1e-6)


def test_what_is_alike_is_not_spread() -> None:
    g = torch.ones(4, 3)
    assert spread(g, g, g, torch.arange(4)) == pytest.approx({"uniformity": 0, "alignment": 1}, abs=1e-6)
    assert spread(g, g, g, torch.full((4,), 7)) == pytest.approx({"tolerance": 1, "alignment": 1}, abs=1e-6)
    assert spread(g[:0], g[:0], g[:0], torch.arange(0)) == {}
