"""What is recorded of a run, in MLflow."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class TrackingConfig(BaseModel):
    """Where runs are recorded."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    enabled: bool = True
    uri: str | None = None
    """Any MLflow tracking URI; None: SQLite and files under the work directory."""
    experiment: str | None = None
    """None: the run's name."""
    system_metrics: bool = True
