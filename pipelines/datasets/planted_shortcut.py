"""A world with a weak feature that is easy to see beside a strong one that is hard to see."""

from __future__ import annotations

import numpy as np
import polars as pl
from pydantic import Field

from pipelines.datasets.base import register_dataset
from pipelines.datasets.planted import LABEL, TRUTH, PlantedOptions, PlantedWorld, categorical, drawn, names, signs
from pipelines.features.spec import FeatureSpec

DISAGREES = "easy_disagrees"


class PlantedShortcutOptions(PlantedOptions):
    """Options of source ``planted_shortcut``."""

    hard: int = Field(3, ge=1, le=6)
    """Fields whose product of signs is the strong feature; alone, none of them tells anything."""
    values: int = Field(20, ge=2, le=999, multiple_of=2)
    """Values of each field: the more, the harder the strong feature is to extract."""
    strong: float = Field(2.0, gt=0, le=20)
    """Effect of the strong feature on the logit."""
    weak: float = Field(1.0, gt=0, le=20)
    """Effect of the easy feature on the logit."""
    idle: int = Field(3, ge=0, le=50)
    """Fields that tell nothing."""


@register_dataset("planted_shortcut")
class PlantedShortcut(PlantedWorld):
    """A made-up log with a weak feature that is easy to see beside a strong one that is hard to extract.

    logit = strong * s_1(x_1) ... s_h(x_h) + weak * s_0(x_0), where each s is -1 or 1. x_0 tells less and lies open,
    the product tells more and must be extracted: predictivity and availability are apart. Column
    ``easy_disagrees``, no feature, marks the rows where both point different ways: who goes by x_0 there is wrong
    more often than not.

    Example:
        >>> frame = PlantedShortcut(PlantedShortcutOptions(rows=2000)).frame()
        >>> round(float(frame["easy_disagrees"].mean()), 1)
        0.5

    Source: availability and predictivity, arXiv 2310.16228.
    """

    Options = PlantedShortcutOptions
    options: PlantedShortcutOptions

    def fields(self) -> list[str]:
        """Return the easy field, those of the hard feature, and those that tell nothing."""
        return ["easy", *names("hard", self.options.hard), *names("idle", self.options.idle)]

    def signs(self) -> dict[str, np.ndarray]:
        """Return s of each field's values, (values,)."""
        make = self.generator(0)
        return {field: signs(make, self.options.values) for field in self.fields()}

    def rows(self, make: np.random.Generator) -> tuple[pl.DataFrame, np.ndarray]:
        """Return fields with uniform values, where both features disagree, and the logit."""
        own, sign = self.options, self.signs()
        index = {field: make.integers(0, own.values, own.rows) for field in sign}
        easy = sign["easy"][index["easy"]]
        hard = np.prod([sign[field][index[field]] for field in names("hard", own.hard)], axis=0)
        columns = [drawn(field, values) for field, values in index.items()]
        return pl.DataFrame([*columns, pl.Series(DISAGREES, easy != hard)]), own.strong * hard + own.weak * easy

    def spec(self) -> FeatureSpec:
        """Return every field as a categorical one."""
        return FeatureSpec(label=LABEL, dim=8, columns=categorical(self.fields()), keep=(TRUTH, DISAGREES))
