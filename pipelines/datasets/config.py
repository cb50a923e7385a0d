"""Where raw logs come from and how their rows are split."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class SplitConfig(BaseModel):
    """Which rows train, validate and test."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    by: Literal["given", "time", "random", "column"] = "time"
    """``given``: the source has the three parts. ``time``: oldest rows train, newest test. ``random``: by a
    seeded hash of the row number. ``column``: a column holds 'train', 'valid' or 'test'."""
    column: str | None = None
    train: float = Field(0.8, gt=0, lt=1)
    valid: float = Field(0.1, gt=0, lt=1)
    """Shares of the rows; the rest tests."""

    @model_validator(mode="after")
    def _fits(self) -> SplitConfig:
        if self.train + self.valid >= 1:
            raise ValueError("train and valid leave no row to test; make them sum to less than 1")
        if self.by == "column" and self.column is None:
            raise ValueError("split by column needs the column's name")
        return self


class DataConfig(BaseModel):
    """A registered source, where it lies, and its own options."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    source: str = "click_world"
    path: Path | None = None
    split: SplitConfig | None = None
    """None: the source's own (given parts, its published split, or time)."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Checked against the source's own config."""
