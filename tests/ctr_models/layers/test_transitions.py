from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import sparse

from ctr_models.layers.transitions import TransitionDistillation


def counted(items: int = 9) -> np.ndarray:
    """Counts with an item that nothing follows, one with a single follower, and one that all follow."""
    rng = np.random.default_rng(0)
    counts = rng.poisson(0.6, (items, items))
    counts[3] = 0
    counts[4] = np.eye(items, dtype=int)[7] * 5
    counts[5] = rng.integers(1, 4, items)
    return counts


def distillation(counts: np.ndarray, **options: float) -> TransitionDistillation:
    matrix = sparse.csr_array(counts)
    return TransitionDistillation(matrix.indptr, matrix.indices, matrix.data, **options)


def dense_loss(counts: np.ndarray, vectors: torch.Tensor, given: torch.Tensor, temperature: float) -> torch.Tensor:
    """The definition, with the whole teacher."""
    shares = torch.from_numpy(counts / np.maximum(counts.max(1, keepdims=True), 1)).to(vectors.dtype)
    teacher = torch.softmax(shares / temperature, 1)
    student = torch.log_softmax(vectors.shape[1] ** 0.5 * vectors @ vectors.T / temperature, 1)
    followed = given[torch.from_numpy(counts.sum(1) > 0)[given]]
    return -(teacher * student).sum(1)[followed].mean()


@pytest.mark.parametrize("temperature", [0.05, 0.1, 1.0])
def test_it_is_the_cross_entropy_with_the_dense_teacher(temperature: float) -> None:
    counts, given = counted(), torch.tensor([0, 3, 4, 5, 8])
    vectors = (torch.randn(9, 4, dtype=torch.float64, generator=torch.manual_seed(0)) * 0.3).requires_grad_()
    layer = distillation(counts, temperature=temperature).double()
    loss, expected = layer(vectors, given), dense_loss(counts, vectors, given, temperature)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    (gradient,) = torch.autograd.grad(loss, vectors)
    (wanted,) = torch.autograd.grad(expected, vectors)
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6)


def test_a_low_temperature_does_not_overflow() -> None:
    layer = distillation(counted(), temperature=0.001)
    assert layer(torch.randn(9, 4), torch.arange(9)).isfinite()


@pytest.mark.parametrize("temperature", [0.05, 0.1, 0.2])
def test_the_mass_of_a_single_follower(temperature: float) -> None:
    layer = distillation(counted(), temperature=temperature)
    mass = float(layer.excess[layer.starts[4]] + layer.floor[4])
    assert mass == pytest.approx(1 / (1 + 8 * math.exp(-1 / temperature)))


def test_without_a_follower_there_is_nothing_to_learn() -> None:
    vectors = torch.randn(9, 4, requires_grad=True)
    for given in (torch.tensor([3]), torch.zeros(0, dtype=torch.long)):
        loss = distillation(counted(), temperature=0.1)(vectors, given)
        loss.backward()
        assert loss == 0


def test_no_tensor_is_as_large_as_the_teacher() -> None:
    layer = distillation(counted(), temperature=0.1)
    assert sum(b.numel() for b in layer.buffers()) == 2 * np.count_nonzero(counted()) + 10 + 9


def test_only_the_items_that_ask_are_dropped_out() -> None:
    layer, vectors = distillation(counted(), temperature=0.1, dropout=0.5), torch.randn(9, 4)
    torch.manual_seed(0)
    assert layer(vectors, torch.tensor([5])) != layer(vectors, torch.tensor([5]))
    layer.eval()
    assert layer(vectors, torch.tensor([5])) == layer(vectors, torch.tensor([5]))
