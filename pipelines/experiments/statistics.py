"""The one statistics engine: paired differences between arms, clustered by user, over several training seeds.

What is estimated is the difference to expect of *one* run trained with a fresh seed and judged on fresh users:

    D = mean over seeds s of [ M(challenger trained with s) - M(control trained with s) ]

Averaging the seeds' predictions first would estimate another thing, the difference between two ensembles, which is
smaller and has less variance than what is released. Two sources of chance are in D, and the interval covers both:

- *rows*: other users would have come. A Poisson bootstrap over users, with the same weights for every arm and seed,
  gives the covariance (S, S) of the seeds' differences; its mean is the variance of D with these very models.
- *seeds*: other models would have been trained. The sample variance s^2 of the seeds' differences adds s^2 / S.

Noise of the rows that each seed has for itself is in both parts, which errs on the wide side. The interval is
D -+ t sqrt(variance), with Welch and Satterthwaite's degrees of freedom, so that three seeds count as three and not
as many; the tests simulate its coverage. With one seed it covers rows only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy import sparse, stats

from ctr_models.errors import ConfigError, DataError, nearest
from pipelines.evaluation.metrics import Floats, auc, row_logloss, user_auc

Verdict = Literal["better", "worse", "noise"]
Statistic = Callable[[Floats], Floats]
"""Cluster weights (K, C) to the statistic of each of C resamples, (C,)."""

METRICS: dict[str, bool] = {"auc": True, "logloss": False, "gauc": True}
"""Metrics with intervals, and whether more is better."""
MIN_CLUSTERS = 10
CELLS = 1_000_000
"""Numbers in the largest temporary array (score levels times resamples): 8 MB, which a cache may hold."""


@dataclass(frozen=True)
class Difference:
    """Challenger minus control, with the interval that chance allows.

    Args:
        challenger, control: names of the arms.
        metric: ``auc``, ``logloss``, ``gauc`` or the name of a mean.
        value: the difference, in the metric's unit.
        low, high: the interval.
        p: two-sided p value, before any correction.
        confidence: level of this interval; above 1 - alpha where several challengers share one alpha.
        verdict: ``noise`` exactly if the interval contains zero.
        seeds, clusters, rows: what it rests on.
    """

    challenger: str
    control: str
    metric: str
    value: float
    low: float
    high: float
    p: float
    confidence: float
    verdict: Verdict
    seeds: int
    clusters: int
    rows: int


@dataclass(frozen=True)
class Estimate:
    """A difference with its standard error and degrees of freedom."""

    value: float
    error: float
    freedom: float

    @property
    def p(self) -> float:
        """Two-sided p value of the hypothesis that there is no difference."""
        if self.error == 0:
            return 1.0 if self.value == 0 else 0.0
        return float(2 * stats.t.sf(abs(self.value) / self.error, self.freedom))

    def interval(self, alpha: float) -> tuple[float, float]:
        """Return the interval of level 1 - alpha."""
        half = float(stats.t.isf(alpha / 2, self.freedom)) * self.error
        return self.value - half, self.value + half


def compare(
    label: npt.ArrayLike,
    cluster: npt.ArrayLike,
    predictions: Mapping[str, npt.ArrayLike],
    *,
    control: str | Mapping[str, str],
    metrics: Sequence[str] = ("auc", "logloss"),
    alpha: float = 0.05,
    resamples: int = 1000,
    seed: int = 0,
) -> list[Difference]:
    """Compare each challenger with its control on the same rows.

    Args:
        label: 0 or 1, (N,).
        cluster: what is resampled as one, usually the user, (N,) integers.
        predictions: probabilities by arm, (S, N): the same rows and the same S seeds for every arm.
        control: name of the arm that the others are compared with; or, where challengers have different ones, the
            name of each challenger's control by its own.
        metrics: of ``auc``, ``logloss``, ``gauc``.
        alpha: chance of a wrong verdict on a metric, over all challengers together (Holm).
        resamples: bootstrap resamples of the clusters.
        seed: of the bootstrap.

    Returns:
        One difference a challenger and metric, in the order of ``predictions``, then of ``metrics``.

    Raises:
        ConfigError: unknown control or metric.
        DataError: arms differ in shape, too few clusters, one class, NaN.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> p = rng.uniform(size=4000)
        >>> y = rng.uniform(size=4000) < p
        >>> arms = {"coin": rng.uniform(size=(1, 4000)), "oracle": p[None]}
        >>> [d.verdict for d in compare(y, np.arange(4000) // 4, arms, control="coin", resamples=200)]
        ['better', 'better']

    Source: Poisson bootstrap, arXiv 1012.2789; AUC as a U-statistic, DeLong et al. 1988; Holm 1979.
    """
    controls = _controls(control, predictions)
    for metric in metrics:
        if metric not in METRICS:
            raise ConfigError(
                f"no interval for metric {metric!r}", where="metrics", remedy=nearest(metric, METRICS)
            )
    code, clusters = _codes(cluster)
    arms = {name: np.atleast_2d(np.asarray(p, dtype=np.float64)) for name, p in predictions.items()}
    shape = (next(iter(arms.values())).shape[0], len(code))
    for name, p in arms.items():
        if p.shape != shape:
            raise DataError(
                f"predictions have shape {p.shape}, expected (seeds, rows) = {shape}",
                where=f"arm {name}",
                remedy="every arm needs the same rows and the same seeds",
            )
        auc(label, p[0])  # its checks name the offending row
    y = np.asarray(label) == 1
    make: dict[str, Callable[[Floats], Statistic]] = {
        "auc": lambda p: weighted_auc(y, p, code, clusters),
        "logloss": lambda p: weighted_mean(row_logloss(y, p), np.ones(len(y)), code, clusters),
        "gauc": lambda p: weighted_mean(*user_auc(y, p, code), np.arange(clusters), clusters),
    }
    tables = {m: {name: [make[m](row) for row in p] for name, p in arms.items()} for m in metrics}
    return _differences(tables, controls, clusters, len(code), alpha, resamples, seed, METRICS)


def compare_means(
    values: Mapping[str, npt.ArrayLike],
    cluster: npt.ArrayLike,
    *,
    control: str,
    metric: str = "mean",
    more_is_better: bool = True,
    alpha: float = 0.05,
    resamples: int = 1000,
    seed: int = 0,
) -> list[Difference]:
    """Compare the means of any per-row number, such as revenue or regret, as :func:`compare` does metrics.

    Args:
        values: by arm, (S, N): the same rows for every arm.
        cluster: what is resampled as one, (N,).

    Example:
        >>> rng = np.random.default_rng(0)
        >>> base = rng.normal(size=1000)
        >>> arms = {"a": base, "b": base + rng.normal(0.2, 0.1, 1000)}
        >>> compare_means(arms, np.arange(1000) // 2, control="a", resamples=200)[0].verdict
        'better'
    """
    controls = _controls(control, values)
    code, clusters = _codes(cluster)
    arms = {name: np.atleast_2d(np.asarray(v, dtype=np.float64)) for name, v in values.items()}
    for name, v in arms.items():
        if v.shape != (arms[control].shape[0], len(code)) or not np.isfinite(v).all():
            raise DataError(f"values are not finite or have shape {v.shape}", where=f"arm {name}")
    ones = np.ones(len(code))
    tables = {metric: {n: [weighted_mean(row, ones, code, clusters) for row in v] for n, v in arms.items()}}
    return _differences(tables, controls, clusters, len(code), alpha, resamples, seed, {metric: more_is_better})


def weighted_auc(y: npt.NDArray[np.bool_], score: Floats, code: npt.NDArray[np.int64], clusters: int) -> Statistic:
    """Return AUC as a function of cluster weights, exact with ties: rows are sorted once for all resamples.

    AUC(w) = sum_v P_v (N_<v + N_v / 2) / (P N), P_v and N_v the weight of clicks and others at score v
    """
    _, level = np.unique(score, return_inverse=True)
    # Neighbouring levels that hold one class alone merge: no pair of rows inside them counts.
    kind = np.bincount(level[y], minlength=level.max() + 1).astype(bool) + 2 * (
        np.bincount(level[~y], minlength=level.max() + 1).astype(bool)
    )
    opens = (kind[1:] != kind[:-1]) | (kind[1:] == 3)
    level = np.append(0, np.cumsum(opens))[level]
    shape = (int(level.max()) + 1, clusters)
    # Each matrix sums cluster weights into levels.
    positives = sparse.csr_array((np.ones(int(y.sum())), (level[y], code[y])), shape=shape)
    negatives = sparse.csr_array((np.ones(int((~y).sum())), (level[~y], code[~y])), shape=shape)
    step = max(1, CELLS // shape[0])

    def statistic(weights: Floats) -> Floats:
        result = np.empty(weights.shape[1])
        for start in range(0, weights.shape[1], step):
            w = np.ascontiguousarray(weights[:, start : start + step])
            clicks = positives @ w  # (V, c)
            others = negatives @ w  # (V, c)
            total = clicks.sum(0) * others.sum(0)
            below = np.cumsum(others, axis=0)
            others *= 0.5
            below -= others
            with np.errstate(invalid="ignore"):
                result[start : start + step] = np.einsum("vc,vc->c", clicks, below) / total
        return result

    return statistic


def weighted_mean(values: Floats, sizes: Floats, code: npt.NDArray[np.int64], clusters: int) -> Statistic:
    """Return a mean, weighted by ``sizes`` (N,), as a function of cluster weights."""
    top = np.bincount(code, weights=values * sizes, minlength=clusters)
    bottom = np.bincount(code, weights=sizes, minlength=clusters)

    def statistic(weights: Floats) -> Floats:
        with np.errstate(invalid="ignore"):
            return (top @ weights) / (bottom @ weights)

    return statistic


def bootstrap(statistics: Sequence[Statistic], clusters: int, *, resamples: int, seed: int) -> Floats:
    """Evaluate statistics under Poisson(1) weights of the clusters, the same for all of them.

    Returns:
        (R, K) with R at most ``resamples``: one in which a statistic is undefined, such as an AUC without a
        click, is left out.
    """
    rng = np.random.default_rng(seed)
    step = max(1, CELLS // clusters)
    rows = []
    for start in range(0, resamples, step):
        weights = rng.poisson(1.0, size=(clusters, min(step, resamples - start))).astype(np.float64)
        rows.append(np.stack([statistic(weights) for statistic in statistics], axis=1))
    draws = np.concatenate(rows)
    return draws[np.isfinite(draws).all(axis=1)]


def estimate(point: Floats, draws: Floats, clusters: int) -> Estimate:
    """Put rows and seeds together, as the module's docstring says.

    Args:
        point: the seeds' differences, (S,).
        draws: their bootstrap resamples, (R, S).
        clusters: number of clusters resampled.
    """
    seeds = len(point)
    covariance = np.atleast_2d(np.cov(draws, rowvar=False))
    rows = max(0.0, float(covariance.mean()))
    if seeds == 1:
        return Estimate(float(point[0]), rows**0.5, clusters - 1)
    between = float(point.var(ddof=1)) / seeds
    total = rows + between
    if total == 0:
        return Estimate(float(point.mean()), 0.0, clusters - 1)
    freedom = total**2 / (rows**2 / (clusters - 1) + between**2 / (seeds - 1))
    return Estimate(float(point.mean()), total**0.5, freedom)


def cluster_robust_mean(values: npt.ArrayLike, cluster: npt.ArrayLike) -> Estimate:
    """Estimate a mean of rows without resampling, by the sandwich variance: the bootstrap's cross-check.

    Args:
        values: per-row differences, (N,).
        cluster: what is independent of what, (N,).

    Example:
        >>> e = cluster_robust_mean([1.0, 3.0, 2.0, 2.0], [0, 0, 1, 1])
        >>> e.value, e.error
        (2.0, 0.0)

    Source: Liang and Zeger 1986.
    """
    v = np.asarray(values, dtype=np.float64)
    code, clusters = _codes(cluster, least=2)
    sums = np.bincount(code, weights=v - v.mean(), minlength=clusters)
    variance = float(sums @ sums) * clusters / (clusters - 1) / len(v) ** 2
    return Estimate(float(v.mean()), variance**0.5, clusters - 1)


def holm(p: Sequence[float], alpha: float) -> list[float]:
    """Return the level each hypothesis is tested at so that all together err with chance alpha at most.

    The k-th smallest p is tested at alpha / (m - k + 1); at the first that fails, it and the rest keep that level.
    An interval at 1 - level then excludes zero exactly if Holm's procedure rejects.

    Example:
        >>> holm([0.001, 0.2, 0.04], 0.06)
        [0.02, 0.03, 0.03]

    Source: Holm 1979.
    """
    order = np.argsort(p, kind="stable")
    levels = [0.0] * len(p)
    rejected = 0
    for index in order:
        level = alpha / (len(p) - rejected)
        levels[index] = level
        if p[index] < level and rejected < len(p) - 1:
            rejected += 1
    return levels


def _controls(control: str | Mapping[str, str], arms: Iterable[str]) -> dict[str, str]:
    """Return the control of each challenger."""
    names = list(arms)
    given = {n: control for n in names if n != control} if isinstance(control, str) else dict(control)
    for name in [control] if isinstance(control, str) else [*given.values(), *given]:
        if name not in names:
            raise ConfigError(f"no arm {name!r}", where="control", remedy=nearest(name, names))
    return given


def _differences(
    tables: Mapping[str, Mapping[str, Sequence[Statistic]]],
    controls: Mapping[str, str],
    clusters: int,
    rows: int,
    alpha: float,
    resamples: int,
    seed: int,
    better: Mapping[str, bool],
) -> list[Difference]:
    columns = [(m, name, s) for m, arms in tables.items() for name, own in arms.items() for s in range(len(own))]
    statistics = [tables[m][name][s] for m, name, s in columns]
    whole = np.concatenate([statistic(np.ones((clusters, 1))) for statistic in statistics])
    if not np.isfinite(whole).all():
        metric, name, _ = columns[int(np.argmin(np.isfinite(whole)))]
        raise DataError(f"{metric} is undefined on these rows", where=f"arm {name}", remedy="compare on more rows")
    draws = bootstrap(statistics, clusters, resamples=resamples, seed=seed)
    if len(draws) < max(2, resamples // 2):
        raise DataError(
            f"{resamples - len(draws)} of {resamples} resamples lack a click or a non-click",
            where="comparison",
            remedy="compare on more rows",
        )
    found: dict[tuple[str, str], Difference] = {}
    challengers = [name for name in next(iter(tables.values())) if name in controls]
    for metric, arms in tables.items():
        where = {name: [i for i, c in enumerate(columns) if c[:2] == (metric, name)] for name in arms}
        pairs = [(where[name], where[controls[name]]) for name in challengers]
        estimates = [estimate(whole[a] - whole[b], draws[:, a] - draws[:, b], clusters) for a, b in pairs]
        for name, e, level in zip(challengers, estimates, holm([e.p for e in estimates], alpha), strict=True):
            low, high = e.interval(level)
            found[name, metric] = Difference(
                name, controls[name], metric, e.value, low, high, e.p, 1 - level,
                verdict(low, high, better[metric]), len(where[name]), clusters, rows,
            )  # fmt: skip
    return [found[name, metric] for name in challengers for metric in tables]


def verdict(low: float, high: float, more_is_better: bool) -> Verdict:
    """Say what an interval of a difference means."""
    if low <= 0 <= high:
        return "noise"
    return "better" if (low > 0) == more_is_better else "worse"


def _codes(cluster: npt.ArrayLike, least: int = MIN_CLUSTERS) -> tuple[npt.NDArray[np.int64], int]:
    names, code = np.unique(np.asarray(cluster), return_inverse=True)
    if len(names) < least:
        raise DataError(
            f"{len(names)} clusters are too few to tell chance from difference",
            where="comparison",
            remedy=f"give at least {least} users, or cluster by row where users aren't known",
        )
    return code.astype(np.int64), len(names)
