"""How a model is trained, as a list of phases."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class RecipeConfig(BaseModel):
    """A recipe by name and its options."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str = "fit"
    options: dict[str, Any] = Field(default_factory=dict)
