"""For tests and for the examples in docstrings alike."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

REGISTRIES = {
    "ctr_models.gates.base": "GATES",
    "ctr_models.model": "MODELS",
    "pipelines.datasets.base": "DATASETS",
    "pipelines.training.recipes": "RECIPES",
}


@pytest.fixture(autouse=True)
def _examples_leave_no_names() -> Iterator[None]:
    """Take out of the registries what an example or a test defined inside itself and registered."""
    yield
    for module, name in REGISTRIES.items():
        if module in sys.modules:
            classes = getattr(sys.modules[module], name)._classes
            for key, cls in list(classes.items()):
                if getattr(sys.modules.get(cls.__module__), cls.__qualname__, None) is not cls:
                    del classes[key]
