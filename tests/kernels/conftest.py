"""Operators as these tests see them, and an interpreter of Triton that rounds as a GPU does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter


@pytest.fixture(autouse=True)
def _any_size(any_size: None) -> None:
    """All of them by their faster ways, small as examples are."""


@pytest.fixture(autouse=True)
def _rounds_to_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Round float32 to the nearest bfloat16; the interpreter cuts its lower half off, twice the error of a GPU."""
    convert = interpreter._convert_float

    def rounded(values: np.ndarray, given: Any, wanted: Any, mode: Any) -> np.ndarray:
        if (given, wanted) != (tl.float32, tl.bfloat16):
            return convert(values, given, wanted, mode)
        exact = torch.from_numpy(np.ascontiguousarray(values).view(np.float32))
        return exact.bfloat16().view(torch.int16).numpy().view(np.uint16)

    monkeypatch.setattr(interpreter, "_convert_float", rounded)
