"""The metrics of the field, under the names that papers use."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from ctr_models.errors import DataError

Floats = npt.NDArray[np.float64]
Binning = Literal["mass", "width"]

CLIP = 1e-7
"""Probabilities are kept this far from 0 and 1 before a logarithm: about what float32 can tell from 1."""


def auc(label: npt.ArrayLike, score: npt.ArrayLike) -> float:
    """Area under the ROC curve: the chance that a click scores above a non-click, ties counting one half.

        AUC = (sum of the clicks' ranks - P (P + 1) / 2) / (P N)

    Args:
        label: 0 or 1, (N,).
        score: logits or probabilities, (N,); only their order counts.

    Returns:
        A number in [0, 1]; 0.5 for constant scores.

    Raises:
        DataError: empty, lengths differ, a label other than 0 or 1, one class only, NaN.

    Example:
        >>> auc([0, 1, 0, 1], [0.1, 0.9, 0.4, 0.4])
        0.875
    """
    y, s = _checked(label, score, both_classes=True)
    order = np.argsort(s, kind="stable")
    clicks = y[order]
    twice = _twice_mean_rank(_run_starts(s[order]), len(y))
    positives = int(clicks.sum())
    negatives = len(y) - positives
    return float(_from_ranks(twice[clicks].sum(), positives, negatives))


def gauc(label: npt.ArrayLike, score: npt.ArrayLike, group: npt.ArrayLike) -> float:
    """AUC inside each user, averaged by impressions over the users that have both labels.

        GAUC = sum_u n_u AUC_u / sum_u n_u

    Args:
        label: 0 or 1, (N,).
        score: logits or probabilities, (N,).
        group: the user of each row, (N,) integers.

    Returns:
        A number in [0, 1]. Users with clicks only or without clicks have no AUC and are left out, so their
        impressions carry no weight.

    Raises:
        DataError: as :func:`auc`, and when no user has both labels.

    Example:
        >>> gauc([0, 1, 0, 1, 1], [0.1, 0.9, 0.4, 0.2, 0.3], [7, 7, 8, 8, 9])
        0.5

    Source: arXiv 1706.06978.
    """
    value = _gauc(label, score, group)
    if np.isnan(value):
        raise DataError(
            "no user has both clicks and non-clicks, so GAUC is undefined",
            where="group",
            remedy="check the user column, or give more rows a user",
        )
    return value


def logloss(label: npt.ArrayLike, p: npt.ArrayLike) -> float:
    """Mean cross-entropy in nats, -(y ln p + (1 - y) ln(1 - p)), p clipped to [1e-7, 1 - 1e-7].

    Args:
        label: 0 or 1, (N,).
        p: probabilities, (N,).

    Raises:
        DataError: empty, lengths differ, a label other than 0 or 1, NaN, a probability outside [0, 1].

    Example:
        >>> round(logloss([0, 1], [0.2, 0.8]), 6)
        0.223144
    """
    y, q = _checked(label, p, probability=True)
    return float(row_logloss(y, q).mean())


def row_logloss(y: npt.NDArray[np.bool_], p: Floats) -> Floats:
    """Return each row's cross-entropy, (N,), of labels and probabilities known to be right."""
    q = np.clip(p, CLIP, 1 - CLIP)
    return -np.log(np.where(y, q, 1 - q))


def normalized_entropy(label: npt.ArrayLike, p: npt.ArrayLike) -> float:
    """Logloss over that of always predicting the mean click rate: below 1 is better than knowing nothing.

    Args:
        label: 0 or 1, (N,).
        p: probabilities, (N,).

    Raises:
        DataError: as :func:`logloss`, and when only one class is present.

    Example:
        >>> normalized_entropy([0, 1, 0, 1], [0.5, 0.5, 0.5, 0.5])
        1.0

    Source: He et al., Practical Lessons from Predicting Clicks on Ads at Facebook, 2014.
    """
    y, q = _checked(label, p, probability=True, both_classes=True)
    rate = float(y.mean())
    entropy = -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate))
    return float(row_logloss(y, q).mean() / entropy)


def ece(label: npt.ArrayLike, p: npt.ArrayLike, *, bins: int = 20, binning: Binning = "mass") -> float:
    """Expected calibration error: how far mean prediction and click rate lie apart, averaged over bins.

        ECE = sum_b (n_b / N) |mean p_b - mean y_b|

    Args:
        label: 0 or 1, (N,).
        p: probabilities, (N,).
        bins: how many; equal predictions share one, so there may be fewer.
        binning: ``mass`` cuts at quantiles of p, ``width`` cuts [0, 1] evenly.

    Raises:
        DataError: as :func:`logloss`.

    Example:
        >>> round(ece([0, 0, 1, 1], [0.1, 0.1, 0.8, 0.8], bins=2), 6)
        0.15

    Source: arXiv 1706.04599.
    """
    count, predicted, observed = binned(label, p, bins=bins, binning=binning)
    return float(np.average(np.abs(predicted - observed), weights=count))


def binned(
    label: npt.ArrayLike, p: npt.ArrayLike, *, bins: int, binning: Binning
) -> tuple[npt.NDArray[np.int64], Floats, Floats]:
    """Return rows, mean prediction and click rate of each bin that holds a row, by rising prediction."""
    if bins < 1:
        raise ValueError(f"bins is {bins}; it must be at least 1")
    y, q = _checked(label, p, probability=True)
    if binning == "width":
        edges = np.linspace(0, 1, bins + 1)[1:-1]
    else:
        # An edge is a prediction that occurs, so that rows with equal predictions never part.
        last = np.unique(np.arange(1, bins) * len(q) // bins) - 1
        last = last[last >= 0]
        edges = np.unique(np.partition(q, last)[last])
    index = np.searchsorted(edges, q, side="left")
    count = np.bincount(index)
    held = count > 0
    predicted = np.bincount(index, weights=q)[held] / count[held]
    observed = np.bincount(index, weights=y)[held] / count[held]
    return count[held], predicted, observed


def relaimpr(model: float, base: float) -> float:
    """Relative improvement of one AUC over another, in per cent, where 0.5 is worth nothing.

        RelaImpr = ((AUC_model - 0.5) / (AUC_base - 0.5) - 1) * 100

    Raises:
        DataError: the base is no better than chance.

    Example:
        >>> round(relaimpr(0.75, 0.7), 6)
        25.0

    Source: arXiv 1706.06978.
    """
    if not base > 0.5:
        raise DataError(f"base AUC is {base}", where="relaimpr", remedy="compare with a model better than chance")
    return ((model - 0.5) / (base - 0.5) - 1) * 100


def evaluate(label: npt.ArrayLike, p: npt.ArrayLike, group: npt.ArrayLike | None = None) -> dict[str, float]:
    """Return ``auc``, ``logloss``, ``ne`` and ``ece`` of a set of predictions, and ``gauc`` if users are given.

    Args:
        label: 0 or 1, (N,).
        p: probabilities, (N,).
        group: the user of each row, (N,). ``gauc`` is left out without it, and NaN when no user has both labels.

    Raises:
        DataError: as the single metrics.

    Example:
        >>> sorted(evaluate([0, 1, 1], [0.2, 0.7, 0.4], [1, 1, 2]))
        ['auc', 'ece', 'gauc', 'logloss', 'ne']
    """
    metrics = {
        "auc": auc(label, p),
        "logloss": logloss(label, p),
        "ne": normalized_entropy(label, p),
        "ece": ece(label, p),
    }
    if group is not None:
        metrics["gauc"] = _gauc(label, p, group)
    return metrics


def user_auc(y: npt.NDArray[np.bool_], score: Floats, user: np.ndarray) -> tuple[Floats, Floats]:
    """Return each user's AUC and the impressions it stands for, (U,), users in rising order.

    A user without both labels has no AUC: impressions 0 (and AUC 0, for sums).
    """
    order = np.lexsort((score, user))
    clicks, s, users = y[order], score[order], user[order]
    opens = _run_starts(users)  # (U,) where each user's rows begin
    twice = _twice_mean_rank(np.union1d(opens, _run_starts(s)), len(y))
    impressions = np.diff(np.append(opens, len(y)))
    code = np.repeat(np.arange(len(opens)), impressions)[clicks]
    positives = np.bincount(code, minlength=len(opens))
    # Ranks count from the start of all rows; a user's own count from the user's first row.
    ranks = np.bincount(code, weights=twice[clicks], minlength=len(opens)) - 2.0 * positives * opens
    both = (positives > 0) & (positives < impressions)
    value = np.zeros(len(opens))
    value[both] = _from_ranks(ranks[both], positives[both], (impressions - positives)[both])
    return value, np.where(both, impressions, 0).astype(np.float64)


def _gauc(label: npt.ArrayLike, score: npt.ArrayLike, group: npt.ArrayLike) -> float:
    y, s = _checked(label, score, both_classes=True)
    users = np.asarray(group)
    if users.shape != y.shape:
        raise DataError(
            f"groups have shape {users.shape}, rows {y.shape}", where="group", remedy="give one user a row"
        )
    values, impressions = user_auc(y, s, users)
    return float(np.average(values, weights=impressions)) if impressions.any() else float("nan")


def _from_ranks(twice: npt.ArrayLike, positives: npt.ArrayLike, negatives: npt.ArrayLike) -> Floats:
    """AUC from twice the sum of the clicks' ranks (from 1); twice, so that a mean rank is a whole number."""
    pos, neg = np.asarray(positives, dtype=np.float64), np.asarray(negatives, dtype=np.float64)
    return (np.asarray(twice, dtype=np.float64) - pos * (pos + 1)) / (2 * pos * neg)


def _run_starts(ordered: np.ndarray) -> npt.NDArray[np.int64]:
    """Positions at which a run of equal values begins."""
    return np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))


def _twice_mean_rank(starts: npt.NDArray[np.int64], rows: int) -> npt.NDArray[np.int64]:
    """Twice the rank (from 1) that the rows of a run share, for each row."""
    ends = np.append(starts[1:], rows)
    return np.repeat(starts + ends + 1, ends - starts)


def _checked(
    label: npt.ArrayLike, score: npt.ArrayLike, *, probability: bool = False, both_classes: bool = False
) -> tuple[npt.NDArray[np.bool_], Floats]:
    """Return labels as booleans and scores as float64, or say what is wrong with them and in which row."""
    y, s = np.asarray(label), np.asarray(score, dtype=np.float64)
    if y.ndim != 1 or y.shape != s.shape:
        raise DataError(
            f"labels have shape {y.shape}, scores {s.shape}",
            where="metrics",
            remedy="give one label and one score a row",
        )
    if len(y) == 0:
        raise DataError("no rows", where="metrics", remedy="check the split: it may have left this part empty")
    clicks = y == 1
    wrong = ~(clicks | (y == 0))
    if wrong.any():
        row = int(np.argmax(wrong))
        raise DataError(f"label is {y[row]}", where=f"label, row {row}", remedy="use 0 or 1")
    missing = np.isnan(s)
    if missing.any():
        row = int(np.argmax(missing))
        raise DataError(
            f"score is NaN ({int(missing.sum())} of {len(s)} rows)",
            where=f"score, row {row}",
            remedy="look for a diverged run: lower the learning rate or clip the gradient",
        )
    if probability and ((s < 0) | (s > 1)).any():
        row = int(np.argmax((s < 0) | (s > 1)))
        raise DataError(
            f"probability is {s[row]:g}", where=f"score, row {row}", remedy="pass logits through a sigmoid"
        )
    if both_classes and clicks.all() | ~clicks.any():
        raise DataError(
            f"all {len(y)} labels are {int(clicks[0])}",
            where="label",
            remedy="this metric needs clicks and non-clicks; check the split",
        )
    return clicks, s
