import subprocess
import sys

import pytest

import ctr_models

LIGHT = (
    "ctr_models.errors",
    "pipelines.cli",
    "pipelines.experiments.experiment",
    "serving.commands",
    "serving.server",
    "serving.workers",
    "serving.database",
    "serving.experiment_commands",
    "serving.analysis",
    "serving.guardrails",
    "serving.event_commands",
    "serving.events",
    "serving.export",
)


def test_what_does_not_score_needs_no_torch() -> None:
    code = (
        "import importlib, sys\n"
        f"for name in {LIGHT}:\n"
        "    importlib.import_module(name)\n"
        "    assert not {'torch', 'mlflow'} & set(sys.modules), name\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ctr_models.__all__)
def test_public_names_are_found_when_asked_for(name: str) -> None:
    assert getattr(ctr_models, name) is not None
    assert name in dir(ctr_models)


def test_a_name_that_is_not_public_is_told_as_ever() -> None:
    with pytest.raises(AttributeError, match="module 'ctr_models' has no attribute 'Batsch'"):
        ctr_models.Batsch  # type: ignore[attr-defined]  # noqa: B018
