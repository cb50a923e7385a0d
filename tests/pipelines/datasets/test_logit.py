from __future__ import annotations

import numpy as np
import pytest

from pipelines.datasets.logit import Logit


def test_terms_get_their_weights_and_the_rate_is_met() -> None:
    random = np.random.default_rng(0)
    terms = {"a": random.normal(3, 5, 20_000), "b": random.exponential(2, 20_000), "same": np.full(20_000, 7.0)}
    share = random.random(20_000)
    logit = Logit({"a": 0.5, "b": 1.5, "same": 1.0}, terms, strength=2.0, rate=0.3, share=share)
    assert (terms["a"] * logit.scale["a"]).std() == pytest.approx(0.5)
    assert (terms["b"] * logit.scale["b"]).std() == pytest.approx(1.5)
    assert logit.scale["same"] == 0
    assert logit.spread(terms).mean() == pytest.approx(0, abs=1e-9)
    p = logit.probability(terms)
    assert np.average(p, weights=share) == pytest.approx(0.3, abs=1e-5)
    inner = logit.intercept + 2.0 * logit.spread(terms)
    np.testing.assert_allclose(p, 1 / (1 + np.exp(-inner)), atol=1e-6)


def test_without_strength_every_row_has_the_rate() -> None:
    terms = {"a": np.arange(5.0)}
    p = Logit({"a": 1.0}, terms, strength=0.0, rate=0.25).probability(terms)
    assert p.tolist() == [0.25] * 5
