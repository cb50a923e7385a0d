from __future__ import annotations

from itertools import combinations

import numpy as np
import polars as pl
import pytest

from pipelines.datasets.planted import TRUTH
from pipelines.datasets.planted_orders import PlantedOrders, PlantedOrdersOptions


def spread(frame: pl.DataFrame, fields: tuple[str, ...]) -> float:
    """How far the mean probability goes with the values of these fields."""
    return float(frame.group_by(fields).agg(pl.col(TRUTH).mean())[TRUTH].std())


@pytest.mark.parametrize("order", [2, 3, 4])
def test_all_marginals_of_lower_order_vanish(order):
    world = PlantedOrders(PlantedOrdersOptions(rows=60_000, orders=(order,), idle=1, values=2, strength=2.0))
    frame = world.frame()
    product = tuple(world.products()[order])
    for size in range(1, order):
        for fields in combinations(world.fields(), size):
            assert spread(frame, fields) < 0.02
    assert spread(frame, product) > 0.3


def test_every_order_has_its_own_fields_and_its_own_part_of_the_logit():
    own = PlantedOrdersOptions(rows=500, orders=(2, 3), idle=2, strength=0.7)
    world = PlantedOrders(own)
    assert world.fields() == [f"field_{n:02d}" for n in range(7)]
    frame, sign = world.frame(), world.signs()
    logit = np.zeros(500)
    for order, fields in world.products().items():
        assert len(fields) == order
        numbers = [frame[f].str.slice(1).cast(pl.Int64).to_numpy() for f in fields]
        logit += 0.7 * np.prod([sign[f][n] for f, n in zip(fields, numbers, strict=True)], axis=0)
    assert frame[TRUTH].to_numpy() == pytest.approx(1 / (1 + np.exp(-logit)), abs=1e-6)
