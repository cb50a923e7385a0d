"""MLflow's server as a child: what it takes is in the doctests; here what is told when it does not come up."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ctr_models.errors import ArtifactError
from pipelines.release import registry
from serving.benchmarks.mlflow_server import mlflow_server


def test_one_that_does_not_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "register", lambda *_: 1)
    bundle: Any = SimpleNamespace(directory=tmp_path)
    with pytest.raises(ArtifactError, match="did not start: .*bench"), mlflow_server(bundle, tmp_path):
        pytest.fail("it has no such model")
