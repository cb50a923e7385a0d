"""A world of several populations, each with a click function of its own."""

from __future__ import annotations

from typing import Literal

import numpy as np
import polars as pl
from pydantic import Field, model_validator

from pipelines.datasets.base import register_dataset
from pipelines.datasets.planted import LABEL, TRUTH, PlantedOptions, PlantedWorld, categorical, drawn, names
from pipelines.features.spec import Column, FeatureSpec

POPULATION = "population"


class PlantedPopulationsOptions(PlantedOptions):
    """Options of source ``planted_populations``."""

    populations: int = Field(4, ge=2, le=20)
    told_by: Literal["features", "history"] = "features"
    """What gives a row's population away: its field ``segment``, or the items that its user met before."""
    segments: int = Field(40, ge=2, le=999)
    """Values of field ``segment``; each belongs to one population."""
    items: int = Field(80, ge=2, le=999)
    """Items of the candidate and of histories; in histories each is typical of one population."""
    history: int = Field(10, ge=1, le=1000)
    """Length of each history."""
    typical: float = Field(0.8, gt=0, le=1)
    """Share of a history's items that are typical of the user's population; the others are any."""
    users: int = Field(5_000, ge=10)
    fields: int = Field(5, ge=1, le=50)
    """Fields by which the populations click, each in its own way."""
    values: int = Field(10, ge=2, le=999)
    strength: float = Field(2.0, gt=0, le=20)
    """Standard deviation of the logit inside a population."""

    @model_validator(mode="after")
    def _fits(self) -> PlantedPopulationsOptions:
        told_by = "segments" if self.told_by == "features" else "items"
        if getattr(self, told_by) < self.populations:
            raise ValueError(f"{told_by} must be at least {self.populations}, one for each population")
        return self


@register_dataset("planted_populations")
class PlantedPopulations(PlantedWorld):
    """A made-up log of several populations, each with a click function of its own.

    logit = strength / sqrt(F) * sum_f w_{z, f}(x_f), z the row's population, w drawn from N(0, 1) and centred. A
    user is of one population. The populations' tastes are independent of each other. Column ``population``, no
    feature, holds z.

    Example:
        >>> world = PlantedPopulations(PlantedPopulationsOptions(rows=500, told_by="history"))
        >>> world.frame()["history"].list.len().unique().to_list()
        [10]
    """

    Options = PlantedPopulationsOptions
    options: PlantedPopulationsOptions

    def tastes(self) -> np.ndarray:
        """Return w, (populations, fields, values); over the values of a field each adds up to 0."""
        own = self.options
        taste = self.generator(0).standard_normal((own.populations, own.fields, own.values))
        taste -= taste.mean(2, keepdims=True)
        return taste / taste.std(2, keepdims=True)

    def owners(self, count: int) -> np.ndarray:
        """Return the population that each segment or item belongs to, (count,)."""
        return self.generator(2).permutation(count) % self.options.populations

    def rows(self, make: np.random.Generator) -> tuple[pl.DataFrame, np.ndarray]:
        """Return each row's user, what tells of the population, the fields, the population; and the logit."""
        own, taste = self.options, self.tastes()
        user = make.integers(0, own.users, own.rows)
        population = make.integers(0, own.populations, own.users)  # (users,)
        index = make.integers(0, own.values, (own.fields, own.rows))
        met = taste[population[user], np.arange(own.fields)[:, None], index]  # (fields, rows)
        tells = self._segments(make, population) if own.told_by == "features" else self._histories(make, population)
        columns = [column[user] for column in tells]
        if own.told_by == "history":
            columns.append(drawn("item", make.integers(0, own.items, own.rows)))
        columns += [drawn(field, values) for field, values in zip(names("field", own.fields), index, strict=True)]
        frame = pl.DataFrame([pl.Series("user", user), *columns, pl.Series(POPULATION, population[user])])
        return frame, own.strength / own.fields**0.5 * met.sum(0)

    def spec(self) -> FeatureSpec:
        """Return the fields and what tells of the population; the user is no feature."""
        told: tuple[Column, ...] = (Column(name="segment", kind="categorical", role="user"),)
        if self.options.told_by == "history":
            told = (
                Column(name="item", kind="categorical", role="item"),
                Column(
                    name="history",
                    kind="sequence",
                    role="user",
                    table="item",
                    target="item",
                    max_length=self.options.history,
                ),
            )
        fields = categorical(names("field", self.options.fields))
        return FeatureSpec(label=LABEL, user="user", dim=8, columns=(*fields, *told), keep=(TRUTH, POPULATION))

    def _segments(self, make: np.random.Generator, population: np.ndarray) -> list[pl.Series]:
        """Give each user a segment of his population."""
        owner = self.owners(self.options.segments)
        return [drawn("segment", _of_owner(make, owner, population))]

    def _histories(self, make: np.random.Generator, population: np.ndarray) -> list[pl.Series]:
        """Give each user a history, most of it typical of his population."""
        own = self.options
        size = (own.users, own.history)
        typical = _of_owner(make, self.owners(own.items), np.broadcast_to(population[:, None], size))
        index = np.where(make.random(size) < own.typical, typical, make.integers(0, own.items, size))
        flat = drawn("history", index.ravel())
        return [flat.reshape(size).arr.to_list()]


def _of_owner(make: np.random.Generator, owner: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Draw, for each place, one of the numbers whose owner is wanted there."""
    order = np.argsort(owner, kind="stable")
    counts = np.bincount(owner)
    starts = np.cumsum(counts) - counts
    return order[starts[wanted] + make.integers(0, counts[wanted])]
