"""A world where every field has values that mean something and values that mean nothing."""

from __future__ import annotations

import numpy as np
import polars as pl
from pydantic import Field, model_validator

from pipelines.datasets.base import register_dataset
from pipelines.datasets.planted import LABEL, TRUTH, PlantedOptions, PlantedWorld, categorical, drawn, names, signs
from pipelines.features.spec import FeatureSpec


class PlantedValuesOptions(PlantedOptions):
    """Options of source ``planted_values``."""

    fields: int = Field(6, ge=0, le=50)
    """Fields whose values act by themselves."""
    pairs: int = Field(2, ge=0, le=25)
    """Pairs of fields that act together only: alone, no value of theirs changes the click rate."""
    values: int = Field(40, ge=4, le=999)
    """Values of each field, all as frequent."""
    useless: float = Field(0.5, gt=0, lt=1)
    """Share of the values that change nothing; the number of the others is made even."""
    strength: float = Field(0.6, gt=0, le=5)
    """Mean size of a useful value's effect, and of a pair's, on the logit."""

    @model_validator(mode="after")
    def _something(self) -> PlantedValuesOptions:
        if self.fields + self.pairs == 0:
            raise ValueError("a world needs fields or pairs")
        if not 2 <= self.useful < self.values:
            raise ValueError(f"useless={self.useless} of {self.values} values leaves none of one kind")
        return self

    @property
    def useful(self) -> int:
        """Useful values of each field."""
        return 2 * round(self.values * (1 - self.useless) / 2)


@register_dataset("planted_values")
class PlantedValues(PlantedWorld):
    """A made-up log in which it is known which values of which field are useless.

    logit = sum_f a_f(x_f) + sum_(f, g) strength * s_f(x_f) s_g(x_g). In each field half of the useful values raise
    the logit (a = strength * U(0.5, 1.5), or s = 1), half lower it (minus that, s = -1); for useless values
    a = s = 0. So a useless value is as good as a missing one, and in a pair every value's own click rate is that
    of all rows.

    Example:
        >>> world = PlantedValues(PlantedValuesOptions(fields=1, pairs=1, values=4))
        >>> {field: len(values) for field, values in world.useless_values().items()}
        {'field_00': 2, 'pair_00_a': 2, 'pair_00_b': 2}
    """

    Options = PlantedValuesOptions
    options: PlantedValuesOptions

    def effects(self) -> dict[str, np.ndarray]:
        """Return a or s of each field's values, (values,): exactly 0 for those that are useless."""
        own, make = self.options, self.generator(0)
        found = {}
        for name in names("field", own.fields):
            half = own.strength * make.uniform(0.5, 1.5, own.useful // 2)
            found[name] = self._placed(make, np.concatenate([half, -half]))
        for pair in names("pair", own.pairs):
            for side in "ab":
                found[f"{pair}_{side}"] = self._placed(make, signs(make, own.useful))
        return found

    def useless_values(self) -> dict[str, list[str]]:
        """Return, by field, the values that change no probability."""
        return {
            field: [f"v{number:03d}" for number in np.flatnonzero(effect == 0)]
            for field, effect in self.effects().items()
        }

    def rows(self, make: np.random.Generator) -> tuple[pl.DataFrame, np.ndarray]:
        """Return fields with uniform values, and the logit."""
        own, effects = self.options, self.effects()
        index = {field: make.integers(0, own.values, own.rows) for field in effects}
        met = {field: effect[index[field]] for field, effect in effects.items()}
        logit = np.zeros(own.rows)
        for name in names("field", own.fields):
            logit += met[name]
        for pair in names("pair", own.pairs):
            logit += own.strength * met[f"{pair}_a"] * met[f"{pair}_b"]
        return pl.DataFrame([drawn(field, values) for field, values in index.items()]), logit

    def spec(self) -> FeatureSpec:
        """Return every field as a categorical one."""
        return FeatureSpec(label=LABEL, dim=8, columns=categorical(list(self.effects())), keep=(TRUTH,))

    def _placed(self, make: np.random.Generator, useful: np.ndarray) -> np.ndarray:
        """Give the effects to values drawn at random, 0 to the others."""
        effect = np.zeros(self.options.values)
        effect[make.permutation(self.options.values)[: len(useful)]] = useful
        return effect
