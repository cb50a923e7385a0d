"""What a deployment decides: which model, where, and how much is let in."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ctr_models.errors import ConfigError, explain, nearest

PREFIX = "SLUICE_"


class Settings(BaseModel):
    """Settings of one server process. Each can be set in the environment as ``SLUICE_<NAME>``.

    Example:
        >>> Settings.from_env({"SLUICE_MODEL": "models:/clicks@champion", "SLUICE_PORT": "9000"}).port
        9000
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    model: str
    """``models:/name@alias``, ``models:/name/version`` or the path of a bundle."""
    tracking_uri: str | None = None
    """Of the MLflow store; None is the one under ``runs``."""
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    """0 takes any free port."""
    max_candidates: int = Field(2000, ge=1)
    """Of one request."""
    max_body_bytes: int = Field(4 * 2**20, ge=1024)
    workers: int = Field(2, ge=1, le=256)
    """Threads that encode and score; each takes one request at a time and one core."""
    grace_seconds: float = Field(10.0, ge=0)
    """How long requests in flight may take to end once the server is told to stop."""
    parent: int | None = Field(None, ge=1)
    """A process to end with, however that ends; whoever starts a server for itself gives its own id."""

    @classmethod
    def from_env(cls, environment: Mapping[str, str] | None = None, **given: Any) -> Settings:
        """Read the environment; what is given, and not None, wins.

        Raises:
            ConfigError: naming the variable.
        """
        environment = os.environ if environment is None else environment
        values: dict[str, Any] = {}
        for variable, text in environment.items():
            if variable.startswith(PREFIX):
                name = variable.removeprefix(PREFIX).lower()
                if name not in cls.model_fields:
                    known = [PREFIX + field.upper() for field in cls.model_fields]
                    raise ConfigError("no such setting", where=variable, remedy=nearest(variable, known))
                values[name] = text
        values |= {name: value for name, value in given.items() if value is not None}
        if not values.get("model"):
            raise ConfigError("no model to serve", remedy="give --model models:/name@champion, or set SLUICE_MODEL")
        try:
            return cls(**values)
        except ValidationError as error:
            raise explain(error, cls, "server settings") from None
