from __future__ import annotations

import torch

from ctr_models.gates import GateShape, GateSpec, NoGate


def test_it_returns_its_input_itself_in_every_slot() -> None:
    for slot in NoGate.slots:
        gate, x = GateSpec(name="none").build(GateShape(slot=slot, width=4)), torch.randn(2, 3, 4)  # type: ignore[arg-type]
        assert gate.gated(x) is x
        assert not list(gate.parameters())
