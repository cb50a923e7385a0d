"""What makes the users of the click world buy what they have clicked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from pipelines.datasets.logit import Logit

if TYPE_CHECKING:
    from pipelines.datasets.click_world import World

CONVERSION, CONVERSION_TRUTH = "conversion", "true_conversion"
SHARED = ("quality", "taste", "segment x category")
"""Terms that a conversion has in common with the click before it."""
WEIGHTS = {**dict.fromkeys(SHARED, 0.45), "price": 0.60, "age x category": 0.60, "own device": 0.30}
"""Standard deviation, over rows, of each term of the logit at strength 1."""


class Conversions:
    """A click is followed by a conversion with probability sigmoid(intercept + strength * sum of the terms).

    Args:
        world: whose users and items they are.
        make: draws the terms that only conversions have.
        sizes: number of ages and of categories.
        at: sample rows that fix scales and intercept.
        clicks: the terms of their clicks.
        share: the probabilities of their clicks.
        rate: of conversions a click.
    """

    def __init__(
        self,
        world: World,
        make: np.random.Generator,
        sizes: tuple[int, int],
        at: Mapping[str, np.ndarray],
        clicks: Mapping[str, np.ndarray],
        share: np.ndarray,
        rate: float,
    ) -> None:
        self._world = world
        ages, categories = (make.standard_normal((size, 2)) for size in sizes)
        self._pair = np.einsum("ar,cr->ac", ages, categories)
        terms = self.terms(at, clicks)
        self.logit = Logit(WEIGHTS, terms, strength=world.options.strength, rate=rate, share=share)

    def terms(self, at: Mapping[str, np.ndarray], clicks: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the terms of the logit, unscaled, each (rows,)."""
        world, user, item = self._world, at["user"], at["item"]
        return {
            **{name: clicks[name] for name in SHARED},
            "price": -world.price_z[item],
            "age x category": self._pair[world.age[user], world.category[item]],
            "own device": (at["device"] == world.device[user]).astype(float),
        }

    def draw(
        self,
        make: np.random.Generator,
        at: Mapping[str, np.ndarray],
        clicks: Mapping[str, np.ndarray],
        click: np.ndarray,
    ) -> pl.DataFrame:
        """Return the columns of a log: who converted, null without a click, and the probability after one."""
        probability = self.logit.probability(self.terms(at, clicks))
        drawn = pl.DataFrame({"is": make.random(len(click)) < probability, "click": click, "p": probability})
        return drawn.select(
            pl.when("click").then(pl.col("is").cast(pl.Int8)).alias(CONVERSION), pl.col("p").alias(CONVERSION_TRUTH)
        )
