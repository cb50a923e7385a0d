"""The reliability curve: what was predicted against what happened."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipelines.evaluation.metrics import Binning, Floats, binned

Z95 = 1.959963984540054


@dataclass(frozen=True)
class Reliability:
    """Bins of predictions, by rising prediction.

    Args:
        predicted: mean prediction of each bin, (K,).
        observed: click rate, (K,).
        low, high: 95 % Wilson interval of the click rate, (K,).
        count: rows, (K,).
    """

    predicted: Floats
    observed: Floats
    low: Floats
    high: Floats
    count: npt.NDArray[np.int64]

    @property
    def ratio(self) -> float:
        """Clicks predicted over clicks seen: above 1 the model promises too much; infinite without a click."""
        seen = float(self.observed @ self.count)
        return float(self.predicted @ self.count) / seen if seen else float("inf")


def reliability(
    label: npt.ArrayLike, p: npt.ArrayLike, *, bins: int = 20, binning: Binning = "mass"
) -> Reliability:
    """Bin predictions and compare each bin's mean with its click rate.

        Wilson: (o + z^2 / 2n -+ z sqrt(o (1 - o) / n + z^2 / 4n^2)) / (1 + z^2 / n)

    Args:
        label: 0 or 1, (N,).
        p: probabilities, (N,).
        bins: how many at most; empty ones are left out.
        binning: ``mass`` cuts at quantiles of p, ``width`` cuts [0, 1] evenly.

    Raises:
        DataError: empty, a label other than 0 or 1, NaN, a probability outside [0, 1].

    Example:
        >>> curve = reliability([0, 0, 1, 1], [0.1, 0.1, 0.8, 0.8], bins=2)
        >>> curve.observed.tolist(), round(curve.ratio, 3)
        ([0.0, 1.0], 0.9)

    Source: arXiv 1706.04599.
    """
    n, predicted, observed = binned(label, p, bins=bins, binning=binning)
    square = Z95**2 / n
    middle = observed + square / 2
    half = np.sqrt(Z95**2 * observed * (1 - observed) / n + square**2 / 4)
    low, high = (middle - half) / (1 + square), (middle + half) / (1 + square)
    return Reliability(predicted, observed, np.clip(low, 0, observed), np.clip(high, observed, 1), n)
