from __future__ import annotations

import pytest
import torch
from torch import nn

from pipelines.training.averaging import WeightAverage


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


def test_constant_weights_are_their_own_average():
    one = model()
    average = WeightAverage(one, 0.9)
    before = {n: t.clone() for n, t in one.state_dict().items()}
    for _ in range(5):
        average.update()
    with average.in_place():
        for name, tensor in one.state_dict().items():
            torch.testing.assert_close(tensor, before[name])


def test_the_start_is_soon_forgotten_and_then_the_decay_holds():
    one = nn.Linear(1, 1, bias=False)
    average = WeightAverage(one, 0.5)
    nn.init.zeros_(one.weight)
    with torch.no_grad():
        average._averages[0].fill_(1.0)
    shares = []
    for _ in range(12):
        average.update()
        shares.append(average._averages[0].item())
    assert shares[0] == pytest.approx(2 / 11)
    assert shares[-1] / shares[-2] == pytest.approx(0.5)


def test_batch_statistics_are_averaged_and_counters_are_not():
    one = model()
    average = WeightAverage(one, 0.9)
    one.train()
    one(torch.randn(8, 3) + 5)
    average.update()
    own = one[1].running_mean.clone()
    with average.in_place():
        assert (one[1].running_mean.abs() < own.abs()).all()
        assert one[1].num_batches_tracked == 1
    assert torch.equal(one[1].running_mean, own)
    assert set(average.state()) == {"steps", *(n for n in one.state_dict() if "num_batches" not in n)}


def test_own_weights_come_back_after_an_error():
    one = model()
    average = WeightAverage(one, 0.9)
    with torch.no_grad():
        one[0].weight.fill_(3.0)
    average.update()
    with pytest.raises(RuntimeError), average.in_place():
        assert (one[0].weight != 3.0).all()
        raise RuntimeError
    assert (one[0].weight == 3.0).all()
