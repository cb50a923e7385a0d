from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pipelines.evaluation.ranking import CUTS, Rankings, ranking_metrics, ranking_values, target_ranks


def brute_rank(scores: list[float], target: int, seen: set[int]) -> int:
    """Sort what may be recommended, and count; among equals the target comes last."""
    if target < 0:
        return len(scores) + 1
    offered = [j for j in range(len(scores)) if j == target or j not in seen]
    order = sorted(offered, key=lambda j: (-scores[j], j == target))
    return order.index(target) + 1


def test_ranks_are_those_of_sorting() -> None:
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 12, (60, 15)).astype(np.float32)  # many ties
    target = rng.integers(-1, 15, 60)
    seen = [set(rng.choice(15, rng.integers(0, 14), replace=False).tolist()) for _ in range(60)]
    values = torch.tensor([j for one in seen for j in one])
    rows = torch.repeat_interleave(torch.tensor([len(one) for one in seen]))
    found = target_ranks(torch.from_numpy(scores), torch.from_numpy(target), values, rows)
    expected = [brute_rank(s.tolist(), int(t), own) for s, t, own in zip(scores, target, seen, strict=True)]
    assert found.tolist() == expected
    assert {t in own for t, own in zip(target.tolist(), seen, strict=True)} == {True, False}


def test_an_item_seen_twice_counts_once() -> None:
    twice = torch.tensor([0, 0])
    assert target_ranks(
        torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([2]), twice, torch.tensor([0, 0])
    ).tolist() == [2]


def test_a_model_that_tells_nothing_apart_comes_last() -> None:
    none = torch.zeros(0, dtype=torch.long)
    for constant in (0.0, math.nan):
        scores = torch.full((2, 7), constant)
        assert target_ranks(scores, torch.tensor([0, 6]), none, none).tolist() == [7, 7]


def test_metrics_are_those_of_the_definition() -> None:
    ranks = [1, 2, 5, 6, 10, 11, 20, 21, 4000]
    found = ranking_metrics(ranks)
    for k in CUTS:
        assert found[f"hr_{k}"] == pytest.approx(sum(r <= k for r in ranks) / 9)
        assert found[f"ndcg_{k}"] == pytest.approx(sum(1 / math.log2(r + 1) for r in ranks if r <= k) / 9)


def test_values_have_the_metrics_as_means() -> None:
    ranks = np.array([1, 7, 30])
    assert Rankings(ranks, ranks, ranks).metrics() == {n: v.mean() for n, v in ranking_values(ranks).items()}
