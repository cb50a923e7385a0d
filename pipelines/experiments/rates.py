"""Rates of arms that were dealt to different users: the same engine's half for live traffic.

Offline, every arm scores the same rows, and differences are paired. Live, each user sees one arm, so arms are
independent, and all that an interval needs of one is a handful of sums over its users, which a database can make.
The rate of an arm is a ratio, clicks over candidates shown; users are the clusters, as offline:

    r = sum_k x_k / sum_k n_k        variance = K / (K - 1) sum_k (x_k - r n_k)^2 / (sum_k n_k)^2

Whoever looks at a running experiment every day and stops when zero is outside errs far more often than a fixed
interval says. The sequential interval holds at all looks together, however many: it inverts the mixture of
likelihood ratios

    Lambda = sqrt(e^2 / (e^2 + t^2)) exp(D^2 t^2 / (2 e^2 (e^2 + t^2)))

with D the difference, e its standard error and t the effect that one expects; its p value is 1 / Lambda.

Sources: linearised ratios, Deng et al. 2018 (arXiv 1803.06336); always-valid p values, Johari et al. 2015 (arXiv
1512.04922); sequential test of sample ratios, Lindon and Malek 2020 (arXiv 2011.03567).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy.special import gammaln

from ctr_models.errors import ConfigError, DataError, nearest
from pipelines.experiments.statistics import MIN_CLUSTERS, Difference, Estimate, holm, verdict

EXPECTED = 0.1
"""Effect for which sequential intervals are tightest, as a part of the control's rate. Another order of magnitude
widens them by a fifth or so."""


@dataclass(frozen=True)
class Sums:
    """What an arm's rate rests on: sums over its clusters k of x_k events in n_k chances.

    Example:
        >>> sums = Sums.of([1, 0, 2, 1] * 5, [10, 10, 20, 20] * 5)
        >>> round(sums.rate, 4), round(sums.estimate().error, 4)
        (0.0667, 0.0081)
    """

    clusters: int
    x: float
    n: float
    xx: float
    xn: float
    nn: float

    @classmethod
    def of(cls, x: npt.ArrayLike, n: npt.ArrayLike) -> Sums:
        """Sum up clusters: events (K,) and chances (K,)."""
        a, b = np.asarray(x, dtype=np.float64), np.asarray(n, dtype=np.float64)
        return cls(len(a), float(a.sum()), float(b.sum()), float(a @ a), float(a @ b), float(b @ b))

    @property
    def rate(self) -> float:
        """Events per chance; NaN without a chance."""
        return self.x / self.n if self.n else math.nan

    def estimate(self) -> Estimate:
        """Return the rate with its standard error; without an event that is 0, and says little.

        Raises:
            DataError: too few clusters.
        """
        if self.clusters < MIN_CLUSTERS or not self.n:
            raise DataError(
                f"{self.clusters} units are too few to tell chance from difference", remedy="wait for more traffic"
            )
        squares = max(0.0, self.xx - 2 * self.rate * self.xn + self.rate**2 * self.nn)
        variance = self.clusters / (self.clusters - 1) * squares / self.n**2
        return Estimate(self.rate, variance**0.5, self.clusters - 1)


NOTHING = Sums(0, 0.0, 0.0, 0.0, 0.0, 0.0)
"""Of an arm that nobody saw."""


@dataclass(frozen=True)
class Sequential(Estimate):
    """An estimate whose interval and p value hold at every look together.

    Args:
        expected: the effect for which the interval is tightest, in the estimate's unit; above 0.

    Example:
        >>> once, always = Estimate(0.02, 0.008, 5000), Sequential(0.02, 0.008, 5000, expected=0.02)
        >>> once.p < 0.05 < always.p
        True
    """

    expected: float

    @property
    def p(self) -> float:
        """p value of the hypothesis that there is no difference, valid at whatever moment one looks."""
        if self._variance == 0:
            return super().p
        e2, t2 = self._variance, self.expected**2
        log_ratio = 0.5 * math.log(e2 / (e2 + t2)) + self.value**2 * t2 / (2 * e2 * (e2 + t2))
        return math.exp(-max(0.0, log_ratio))

    def interval(self, alpha: float) -> tuple[float, float]:
        """Return the interval of level 1 - alpha for all looks together."""
        e2, t2 = self._variance, self.expected**2
        if e2 == 0:
            return self.value, self.value
        half = math.sqrt(e2 * (e2 + t2) / t2 * (math.log((e2 + t2) / e2) - 2 * math.log(alpha)))
        return self.value - half, self.value + half

    @property
    def _variance(self) -> float:
        # The mixture is of normal ratios; with few clusters the error is itself uncertain, as Student's t has it.
        return self.error**2 * (self.freedom / (self.freedom - 2) if self.freedom > 2 else math.inf)


def compare_rates(
    arms: Mapping[str, Sums],
    *,
    control: str,
    metric: str = "ctr",
    more_is_better: bool = True,
    alpha: float = 0.05,
    sequential: bool = True,
    waiting: int = 0,
) -> list[Difference]:
    """Compare the rate of each challenger with the control's, as :func:`compare` does metrics of paired rows.

    Args:
        arms: sums by arm.
        control: the arm that the others are compared with.
        metric: name of the rate.
        more_is_better: what counts as better.
        alpha: chance of a wrong verdict, over all challengers together (Holm).
        sequential: at whatever moments one looks; otherwise for one look, at a moment that was set beforehand.
        waiting: challengers that share alpha and can't be compared now: they have few clusters, or are paused.

    Returns:
        One difference a challenger, in the order of ``arms``.

    Raises:
        ConfigError: unknown control.
        DataError: too few clusters in an arm, or no event in the control; with the arm's name.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> shown = rng.poisson(20, size=4000) + 1
        >>> arms = {"open": Sums.of(rng.binomial(shown[:2000], 0.05), shown[:2000]),
        ...         "gated": Sums.of(rng.binomial(shown[2000:], 0.06), shown[2000:])}
        >>> (d,) = compare_rates(arms, control="open")
        >>> d.verdict, d.low < 0.01 < d.high
        ('better', True)
    """
    if control not in arms:
        raise ConfigError(f"no arm {control!r}", where="control", remedy=nearest(control, arms))
    one = {}
    for name, sums in arms.items():
        try:
            one[name] = sums.estimate()
        except DataError as error:
            raise DataError(error.problem, where=f"arm {name}", remedy=error.remedy) from None
    base = arms[control]
    if not base.x:
        raise DataError(f"no event of {metric} yet", where=f"arm {control}", remedy="wait for more traffic")
    for name, sums in arms.items():
        if not sums.x:  # where nothing happened, nothing varies: it is taken to vary as the control does
            one[name] = replace(one[name], error=one[control].error * (base.n / sums.n) ** 0.5)
    estimates = {name: _difference(one[name], one[control], sequential) for name in arms if name != control}
    levels = holm([*(e.p for e in estimates.values()), *[1.0] * waiting], alpha)[: len(estimates)]
    found = []
    for (name, e), level in zip(estimates.items(), levels, strict=True):
        low, high = e.interval(level)
        both = arms[name], arms[control]
        found.append(
            Difference(
                name, control, metric, e.value, low, high, e.p, 1 - level, verdict(low, high, more_is_better), 1,
                sum(s.clusters for s in both), round(sum(s.n for s in both)),
            )
        )  # fmt: skip
    return found


def interval_of_rate(sums: Sums, *, alpha: float = 0.05, sequential: bool = True) -> tuple[float, float]:
    """Return the interval of one arm's rate.

    Raises:
        DataError: too few clusters, or no event.
    """
    one = sums.estimate()
    if not sums.x:
        raise DataError("no event yet", remedy="wait for more traffic")
    if sequential:
        one = Sequential(one.value, one.error, one.freedom, EXPECTED * one.value)
    low, high = one.interval(alpha)
    return max(0.0, low), min(1.0, high)


def sample_ratio_p(counts: Mapping[str, int], shares: Mapping[str, float]) -> float:
    """Return the p value of the hypothesis that units came to the arms by their shares, valid at every look.

    A Bayes factor against shares drawn from a Dirichlet distribution around the expected ones. Less than 0.01 means
    that something keeps units from an arm, and that no difference between the arms is to be trusted.

    Args:
        counts: units by arm.
        shares: expected, of any sum; an arm of share 0 is left out.

    Example:
        >>> shares = {"open": 0.5, "gated": 0.5}
        >>> sample_ratio_p({"open": 5010, "gated": 4990}, shares) > 0.5
        True
        >>> sample_ratio_p({"open": 5200, "gated": 4800}, shares) < 0.01
        True
    """
    names = [name for name, share in shares.items() if share > 0]
    n = np.array([counts.get(name, 0) for name in names], dtype=np.float64)
    theta = np.array([shares[name] for name in names])
    theta = theta / theta.sum()
    prior = CONCENTRATION * theta
    log_ratio = (
        gammaln(prior.sum()) - gammaln(prior.sum() + n.sum()) + (gammaln(prior + n) - gammaln(prior)).sum()
        - n @ np.log(theta)
    )  # fmt: skip
    return math.exp(-max(0.0, float(log_ratio)))


CONCENTRATION = 100.0
"""Of the Dirichlet prior: shares that are off by five percentage points or so are found soonest."""


def _difference(challenger: Estimate, control: Estimate, sequential: bool) -> Estimate:
    parts = challenger.error**2, control.error**2
    variance = sum(parts)
    value = challenger.value - control.value
    if variance == 0:
        freedom = challenger.freedom + control.freedom
    else:
        freedom = variance**2 / (parts[0] ** 2 / challenger.freedom + parts[1] ** 2 / control.freedom)
    if sequential:
        return Sequential(value, variance**0.5, freedom, EXPECTED * control.value)
    return Estimate(value, variance**0.5, freedom)
