from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from ctr_models.errors import DataError
from pipelines.evaluation.calibration import reliability


def test_true_probabilities_lie_inside_their_intervals():
    rng = np.random.default_rng(0)
    p = rng.beta(1, 5, 40_000)
    curve = reliability(rng.random(40_000) < p, p)
    inside = (curve.low <= curve.predicted) & (curve.predicted <= curve.high)
    assert inside.mean() >= 0.85
    assert curve.count.sum() == 40_000
    assert curve.ratio == pytest.approx(1, abs=0.03)


def test_intervals_are_wilsons():
    curve = reliability([1] * 7 + [0] * 13, [0.3] * 20)
    expected = stats.binomtest(7, 20).proportion_ci(0.95, method="wilson")
    assert (curve.low[0], curve.high[0]) == pytest.approx((expected.low, expected.high))


def test_intervals_stay_inside_zero_and_one():
    curve = reliability([0, 0, 1, 1], [0.1, 0.1, 0.9, 0.9], bins=2)
    assert curve.low[0] == 0
    assert curve.high[1] == 1


def test_ratio_tells_too_much_from_too_little():
    assert reliability([0, 1], [0.8, 0.8]).ratio == pytest.approx(1.6)
    assert reliability([0, 0], [0.8, 0.8]).ratio == float("inf")


def test_logits_are_refused():
    with pytest.raises(DataError, match="pass logits through a sigmoid"):
        reliability([0, 1], [-2.0, 3.0])
