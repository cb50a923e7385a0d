"""Trainings that are broken off."""

from __future__ import annotations

from typing import Any

import pytest

from pipelines.training.engine import Engine


class Broken(Exception):
    pass


def break_at(step: int, patch: pytest.MonkeyPatch) -> None:
    """Let the training that comes next end with Broken at its step of that number, the first being 1."""
    take, count = Engine.step, 0

    def breaking(self: Engine, batch: Any) -> Any:
        nonlocal count
        count += 1
        if count == step:
            raise Broken
        return take(self, batch)

    patch.setattr(Engine, "step", breaking)
