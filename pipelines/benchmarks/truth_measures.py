"""What a trained gate has found of a planted truth, as numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy import stats
from torch import Tensor

from ctr_models.batch import Batch
from ctr_models.models.gdcn import GDCN
from pipelines.evaluation.metrics import auc
from pipelines.features.prepare import EncodedData
from pipelines.features.state import FeatureState
from pipelines.features.transform import encoded_rows


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and the 95 % interval of Student's t; with one seed there is none."""

    mean: float
    low: float
    high: float


def interval(values: Sequence[float]) -> Interval:
    """Return the mean of one figure over seeds, each with a world and a training of its own, and its interval.

    Example:
        >>> over = interval([0.5, 0.6, 0.7])
        >>> round(over.mean, 3), round(over.low, 3), round(over.high, 3)
        (0.6, 0.352, 0.848)
    """
    given = np.asarray(values, dtype=float)
    mean, count = float(given.mean()), len(given)
    if count == 1:
        return Interval(mean, float("nan"), float("nan"))
    half = float(stats.t.ppf(0.975, count - 1) * given.std(ddof=1) / count**0.5)
    return Interval(mean, mean - half, mean + half)


def whole_split(data: EncodedData, split: str) -> Batch:
    """Return all rows of a split as one batch, in the order of the files."""
    return encoded_rows(data.frame(split).collect(), data.schema).batch()


def numbers_of(state: FeatureState, table: str) -> dict[str, int]:
    """Return the row of each value that a table knows."""
    values, rows = state.tables[table].known()
    return dict(zip(values.to_list(), rows.tolist(), strict=True))


def dropped_values(
    state: FeatureState, masks: Mapping[str, Tensor], useless: Mapping[str, Sequence[str]]
) -> tuple[float, float]:
    """Return which share of the useless values a selection has dropped, and which share of the useful ones.

    Args:
        state: of the features before any was dropped.
        masks: by table, (rows,); 0 for what is dropped.
        useless: by table, the values that change nothing.

    Returns:
        Recall and false drops.
    """
    found: dict[bool, list[bool]] = {True: [], False: []}
    for table, values in useless.items():
        for value, row in numbers_of(state, table).items():
            found[value in values].append(float(masks[table][row]) == 0)
    return float(np.mean(found[True])), float(np.mean(found[False]))


def products_of(
    state: FeatureState, batch: Batch, signs: Mapping[str, npt.NDArray[np.float64]], fields: Sequence[str]
) -> Tensor:
    """Return the product of the first 2, 3, ... of some fields' signs in each row, (len(fields) - 1, B).

    Args:
        state: of the batch's features.
        batch: rows of a planted world of orders.
        signs: of each field's values v000, v001, ...
        fields: in the order of the world.
    """
    ids, factors = batch.sparse.to_dict(), []
    for field in fields:
        rows = numbers_of(state, field)
        sign = torch.zeros(max(rows.values()) + 1)
        for value, row in rows.items():
            sign[row] = float(signs[field][int(value[1:])])
        factors.append(sign[ids[field].values().long()])
    return torch.stack(factors).cumprod(0)[1:]


@torch.no_grad()
def openings(model: GDCN, batch: Batch, products: Tensor) -> list[float]:
    """Return, for each product P of signs, how much wider the cross gates open for crosses that speak for P.

    The logit of a cross network alone is w . c_0 + sum over layers of w . (x * g) plus a constant, with the
    crosses x = c_0 * (W c + b) that the gate g is offered. So u = w * x * P says of each coordinate of each row
    whether its cross speaks for P (u > 0) or against it. The opening is the mean of g weighed by u where u > 0
    minus the mean of g weighed by -u where u < 0, over rows, layers and coordinates: between -1 and 1, and 0 for a
    gate that lets both pass alike, as gate ``none`` and an untrained one do.

    Args:
        model: of form ``cross_only``.
        batch: B rows.
        products: -1 or 1, (P, B).
    """
    if model.mlp is not None:
        raise ValueError("openings are those of a cross network alone: form: cross_only")
    (c0,) = model.eval().inputs(batch)  # (B, D)
    weight, c = model.head.weight[0], c0
    passed, offered = torch.zeros(2, len(products)), torch.zeros(2, len(products))
    for depth, gate in enumerate(model.cross.gates):
        crossed = model.cross.crossed(depth, c)
        mask, cross = gate(crossed, c), c0 * crossed
        for side, sign in enumerate((1, -1)):
            for number, product in enumerate(products):
                u = (sign * weight * cross * product.unsqueeze(1)).clamp(min=0)  # (B, D)
                passed[side, number] += (u * mask).sum()
                offered[side, number] += u.sum()
        c = model.cross.layer(depth, c0, c)
    means = passed / offered.clamp_min(1e-30)
    return (means[0] - means[1]).tolist()


@torch.no_grad()
def auc_by_layers(model: GDCN, batch: Batch) -> list[float]:
    """Return the AUC with the gates of all layers but the first 0, 1, ..., L closed, L + 1 numbers."""
    if model.mlp is not None:
        raise ValueError("gates are closed in a cross network alone: form: cross_only")
    (c0,) = model.eval().inputs(batch)
    found, c = [], c0
    for depth in range(len(model.cross.gates) + 1):
        # With its gate closed a layer hands on what it is given: the layers above don't change the result.
        found.append(float(auc(batch.label.numpy(), model.head(c).squeeze(1).double().numpy())))
        if depth < len(model.cross.gates):
            c = model.cross.layer(depth, c0, c)
    return found


def normalized_mutual_information(one: npt.ArrayLike, other: npt.ArrayLike) -> float:
    """Return I(X; Y) / ((H(X) + H(Y)) / 2) of two ways to sort the same rows: 0 if unrelated, 1 if the same.

    Args:
        one, other: the class of each row, whole numbers from 0, (N,).

    Example:
        >>> normalized_mutual_information([0, 0, 1, 1], [1, 1, 0, 0])
        1.0
        >>> normalized_mutual_information([0, 0, 1, 1], [0, 1, 0, 1])
        0.0
    """
    one, other = np.asarray(one), np.asarray(other)
    table = np.zeros((one.max() + 1, other.max() + 1))
    np.add.at(table, (one, other), 1 / len(one))
    first, second = stats.entropy(table.sum(1)), stats.entropy(table.sum(0))
    if first + second == 0:
        return 1.0  # one class each: they agree
    return float(max(0.0, 2 * (first + second - stats.entropy(table.ravel())) / (first + second)))
