"""The contract, over every registered gate. Nothing here knows a gate by name."""

from __future__ import annotations

import pytest
import torch

from ctr_models.gates import GATES
from ctr_models.gates.contract import CHECKS, Check
from ctr_models.gates.probe import Case

CLAUSES = [
    pytest.param(check, subject, id=f"{check.name}-{subject}")
    for name in GATES
    for check in CHECKS
    for subject in check.subjects(name)
]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize(("check", "subject"), CLAUSES)
def test_it_holds(check: Check, subject: str | Case) -> None:
    check.run(subject)
