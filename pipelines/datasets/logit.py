"""The logit of a simulated log: terms of known spread, and an intercept that gives a known rate."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


class Logit:
    """logit = intercept + strength * sum_i s_i (t_i - m_i) of terms t_i, fitted on sample rows.

    There each term has mean m_i, and its scale s_i gives it its weight as standard deviation; the intercept makes
    the mean probability the rate.

    Args:
        weights: standard deviation of each term at strength 1.
        terms: of the sample rows, each (rows,).
        strength: multiplies the spread.
        rate: mean probability.
        share: how much each sample row counts in the rate, (rows,); all alike by default.

    Example:
        >>> terms = {"a": np.array([0.0, 2.0, 4.0]), "b": np.array([1.0, 0.0, 1.0])}
        >>> logit = Logit({"a": 0.5, "b": 0.1}, terms, strength=1.0, rate=0.2)
        >>> logit.probability(terms).mean().round(6)
        np.float64(0.2)
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        terms: Mapping[str, np.ndarray],
        *,
        strength: float,
        rate: float,
        share: np.ndarray | None = None,
    ) -> None:
        self.strength = strength
        self.mean, self.scale = {}, {}
        for name, term in terms.items():
            spread = term.std()
            self.mean[name] = term.mean()
            self.scale[name] = weights[name] / spread if spread > 0 else 0.0
        logit = strength * self.spread(terms)
        low, high = -50.0, 50.0
        for _ in range(60):
            middle = (low + high) / 2
            found = np.average(1 / (1 + np.exp(-(middle + logit))), weights=share)
            low, high = (middle, high) if found < rate else (low, middle)
        self.intercept = low

    def spread(self, terms: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the weighed sum of the terms, (rows,), before strength and intercept."""
        total = np.zeros(len(next(iter(terms.values()))))
        for name, term in terms.items():
            total += self.scale[name] * (term - self.mean[name])
        return total

    def probability(self, terms: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the probability of each row, (rows,).

        To six decimals, so that what is published is exactly what labels are drawn from.
        """
        return np.round(1 / (1 + np.exp(-(self.intercept + self.strength * self.spread(terms)))), 6)
