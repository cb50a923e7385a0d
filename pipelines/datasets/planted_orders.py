"""A world whose interactions are of chosen orders, and of no other."""

from __future__ import annotations

import numpy as np
import polars as pl
from pydantic import Field, field_validator, model_validator

from pipelines.datasets.base import register_dataset
from pipelines.datasets.planted import LABEL, TRUTH, PlantedOptions, PlantedWorld, categorical, drawn, names, signs
from pipelines.features.spec import FeatureSpec


class PlantedOrdersOptions(PlantedOptions):
    """Options of source ``planted_orders``."""

    orders: tuple[int, ...] = (2, 3)
    """One product for each, of as many fields as its order says; no field is in two products."""
    idle: int = Field(3, ge=0, le=50)
    """Fields that are in no product."""
    values: int = Field(4, ge=2, le=999, multiple_of=2)
    """Values of each field, all as frequent."""
    strength: float = Field(1.5, gt=0, le=20)
    """Size of a product's effect on the logit."""

    @field_validator("orders")
    @classmethod
    def _orders(cls, orders: tuple[int, ...]) -> tuple[int, ...]:
        wrong = [order for order in orders if not 1 <= order <= 8]
        if not orders or wrong:
            raise ValueError(f"orders are 1 to 8, for example [2, 3]; found {wrong or 'none'}")
        return orders

    @model_validator(mode="after")
    def _fits(self) -> PlantedOrdersOptions:
        if len(set(self.orders)) < len(self.orders):
            raise ValueError(f"an order stands twice in {list(self.orders)}")
        return self


@register_dataset("planted_orders")
class PlantedOrders(PlantedWorld):
    """A made-up log whose interactions are of known orders, and of no other.

    logit = strength * sum over orders k of the product of s_f(x_f) over k fields f, where s_f is -1 or 1. Half of
    each field's values have s = 1. Whatever is known of fewer than k fields of a product, the product is as often
    1 as -1: there is no interaction of lower order that tells anything of it.

    Example:
        >>> PlantedOrders(PlantedOrdersOptions(orders=(2, 3), idle=1)).products()
        {2: ['field_00', 'field_01'], 3: ['field_02', 'field_03', 'field_04']}
    """

    Options = PlantedOrdersOptions
    options: PlantedOrdersOptions

    def fields(self) -> list[str]:
        """Return all fields, those of the products first, order by order."""
        return names("field", sum(self.options.orders) + self.options.idle)

    def products(self) -> dict[int, list[str]]:
        """Return the fields of the product of each order."""
        ends = np.cumsum(self.options.orders)
        fields = self.fields()
        return {
            order: fields[end - order : end] for order, end in zip(self.options.orders, ends.tolist(), strict=True)
        }

    def signs(self) -> dict[str, np.ndarray]:
        """Return s of each field's values, (values,)."""
        make = self.generator(0)
        return {field: signs(make, self.options.values) for field in self.fields()}

    def rows(self, make: np.random.Generator) -> tuple[pl.DataFrame, np.ndarray]:
        """Return fields with uniform values, and the logit."""
        own, sign = self.options, self.signs()
        index = {field: make.integers(0, own.values, own.rows) for field in sign}
        logit = np.zeros(own.rows)
        for fields in self.products().values():
            logit += own.strength * np.prod([sign[field][index[field]] for field in fields], axis=0)
        return pl.DataFrame([drawn(field, values) for field, values in index.items()]), logit

    def spec(self) -> FeatureSpec:
        """Return every field as a categorical one."""
        return FeatureSpec(label=LABEL, dim=8, columns=categorical(self.fields()), keep=(TRUTH,))
