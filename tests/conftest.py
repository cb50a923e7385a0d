"""What every test may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

# Tests run side by side: one thread each, set before torch is imported, and inherited by processes they start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# Without a GPU, Triton's kernels run in its interpreter; it has to know before it is imported.
if not Path("/dev/nvidia0").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A shared machine is slow at times; that is no failure of a property.
settings.register_profile("sluice", parent=settings.default, deadline=None)
settings.load_profile("sluice")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Where real data and Airflow are; tests that need them are skipped without."""
    parser.addoption(
        "--data", type=Path, help="folder with movielens_100k, movielens_1m, frappe …; for tests marked data"
    )
    parser.addoption(
        "--airflow", type=Path, help="virtual environment that holds Airflow; for tests marked airflow"
    )


@pytest.fixture(scope="session")
def data_root(request: pytest.FixtureRequest) -> Path:
    """The folder of ``--data``."""
    return _given(request, "--data", "real data: give the folder that holds them")


@pytest.fixture(scope="session")
def airflow_venv(request: pytest.FixtureRequest) -> Path:
    """The environment of ``--airflow``."""
    return _given(request, "--airflow", "Airflow in an environment of its own: run make airflow-test")


def _given(request: pytest.FixtureRequest, option: str, need: str) -> Path:
    path: Path | None = request.config.getoption(option)
    if path is None:
        pytest.skip(f"needs {need} ({option} FOLDER)")
    if not path.is_dir():
        raise pytest.UsageError(f"{option} {path}: no such folder")
    return path.resolve()
