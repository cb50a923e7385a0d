"""What every gate of slots ``expert`` and ``interaction`` must hold. Nothing here knows a gate by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ctr_models.gates import GATES, Gate, GateShape, GateSpec

B, D, K, C = 12, 6, 5, 4
LENGTHS = [3, 0, 1, 2, 0, 4, 1, 1, 0, 2, 5, 1]
CASES = [
    pytest.param(name, slot, history, id=f"{name}-{slot}{'-history' if history else ''}")
    for name in GATES
    for slot in ("expert", "interaction")
    if slot in GATES[name].slots
    for history in ((False, True) if slot == "expert" else (False,))
]
cases = pytest.mark.parametrize(("name", "slot", "history"), CASES)
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


class Weights(nn.Module):
    """What a model asks a gate of these slots for, as a forward."""

    def __init__(self, gate: Gate, history: bool) -> None:
        super().__init__()
        self.gate, self.history = gate, history

    def forward(self, x: Tensor, values: Tensor, offsets: Tensor, query: Tensor) -> Tensor:
        return self.gate.mixture(x, values, offsets, query) if self.history else self.gate(x)


def make(name: str, slot: str, history: bool, *, seed: int = 0, **options: Any) -> Weights:
    torch.manual_seed(seed)
    width = K if slot == "interaction" else D
    shape = GateShape(slot=slot, width=width, context=C if history else 0, choices=K)  # type: ignore[arg-type]
    return Weights(GateSpec.parse({"name": name, **options}).build(shape), history)


def inputs(slot: str, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Inputs:
    generator = torch.Generator().manual_seed(1)
    offsets = torch.tensor([0, *LENGTHS]).cumsum(0)
    shapes = ((B, K if slot == "interaction" else D), (sum(LENGTHS), C), (B, C))
    x, values, query = (scale * torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return x.to(dtype), values.to(dtype), offsets, query.to(dtype)


def row(given: Inputs, i: int) -> Inputs:
    x, values, offsets, query = given
    first, last = int(offsets[i]), int(offsets[i + 1])
    return x[i : i + 1], values[first:last], torch.tensor([0, last - first]), query[i : i + 1]


@cases
def test_each_row_gets_a_weight_a_choice(name: str, slot: str, history: bool) -> None:
    weights = make(name, slot, history)
    for mode in (True, False):
        found = weights.train(mode)(*inputs(slot))
        assert found.shape == (B, K)
        assert found.dtype == torch.float32
        assert found.isfinite().all()


@cases
def test_weights_that_are_shares_add_up_to_one(name: str, slot: str, history: bool) -> None:
    weights = make(name, slot, history)
    if weights.gate.simplex:
        for mode, scale in ((True, 1.0), (False, 1.0), (True, 100.0), (False, 100.0)):
            found = weights.train(mode)(*inputs(slot, scale=scale))
            assert found.min() >= 0
            torch.testing.assert_close(found.sum(1), torch.ones(B))


@cases
def test_gradients_reach_every_parameter(name: str, slot: str, history: bool) -> None:
    weights, given = make(name, slot, history).train(), inputs(slot)
    weights.gate.anneal(0.0)
    found = weights(*given)
    if found.requires_grad:
        ((found * torch.randn(B, K)).sum() + weights.gate.penalty()).backward()
    for path, parameter in weights.named_parameters():
        assert parameter.grad is not None, path
        assert parameter.grad.isfinite().all(), path
        assert parameter.grad.abs().max() > 0, path


@cases
def test_gradients_are_right(name: str, slot: str, history: bool) -> None:
    weights, (x, values, offsets, query) = make(name, slot, history).double().eval(), inputs(slot, torch.float64)
    x, values, query = x[:4].requires_grad_(), values[:6].requires_grad_(), query[:4].requires_grad_()
    names = [n for n, _ in weights.named_parameters()]

    def found(*given: Tensor) -> Tensor:
        state = dict(zip(names, given[3:], strict=True))
        return torch.func.functional_call(weights, state, (given[0], given[1], offsets[:5], given[2]))

    given = (x, values, query, *(p.detach().requires_grad_() for p in weights.parameters()))
    if found(*given).requires_grad:
        assert torch.autograd.gradcheck(found, given)


@cases
def test_a_row_does_not_depend_on_its_neighbours(name: str, slot: str, history: bool) -> None:
    weights, given = make(name, slot, history).eval(), inputs(slot)
    alone = torch.cat([weights(*row(given, i)) for i in range(B)])
    torch.testing.assert_close(weights(*given), alone, rtol=1e-5, atol=1e-6)


@cases
def test_a_batch_without_a_single_behaviour(name: str, slot: str, history: bool) -> None:
    x, values, offsets, query = inputs(slot)
    weights = make(name, slot, history)
    found = weights(x, values[:0], torch.zeros_like(offsets), query)
    if found.requires_grad:
        found.sum().backward()
    assert found.shape == (B, K)
    assert found.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in weights.parameters())


@cases
def test_one_seed_gives_one_gate(name: str, slot: str, history: bool) -> None:
    given = inputs(slot)
    assert torch.equal(make(name, slot, history)(*given), make(name, slot, history)(*given))
    weights = make(name, slot, history).eval()
    assert torch.equal(weights(*given), weights(*given))


@cases
def test_what_annealing_sets_survives_saving(name: str, slot: str, history: bool, tmp_path: Path) -> None:
    weights, fresh, given = make(name, slot, history), make(name, slot, history, seed=1), inputs(slot)
    entries = set(weights.state_dict())
    weights.gate.anneal(0.7)
    assert set(weights.state_dict()) == entries
    save_file(weights.state_dict(), tmp_path / "gate.safetensors")
    fresh.load_state_dict(load_file(tmp_path / "gate.safetensors"))
    assert torch.equal(weights.eval()(*given), fresh.eval()(*given))


@cases
def test_started_as_the_identity_it_is_the_control(name: str, slot: str, history: bool) -> None:
    if "identity" not in get_args(GATES[name].Config.model_fields["start"].annotation):
        return
    weights, control, given = make(name, slot, history, start="identity"), make("none", slot, history), inputs(slot)
    torch.testing.assert_close(weights.eval()(*given), control(*given), rtol=0, atol=1e-6)
    weights.train()
    target = torch.rand(B, K)
    for _ in range(3):
        weights.zero_grad()
        found = weights(*given)
        if found.requires_grad:
            ((found - target) ** 2).sum().backward()
        with torch.no_grad():
            for parameter in weights.parameters():
                assert parameter.grad is not None
                parameter -= 0.1 * parameter.grad
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in weights.parameters())


@cases
def test_bfloat16_is_near(name: str, slot: str, history: bool) -> None:
    weights, (x, values, offsets, query) = make(name, slot, history).eval(), inputs(slot)
    exact = weights(x, values, offsets, query)
    rough = weights.bfloat16()(x.bfloat16(), values.bfloat16(), offsets, query.bfloat16())
    assert rough.dtype == torch.bfloat16
    torch.testing.assert_close(rough.float(), exact, rtol=0.05, atol=0.05)


@cases
def test_mixed_precision_trains(name: str, slot: str, history: bool) -> None:
    weights = make(name, slot, history).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = weights(*inputs(slot))
        loss = found.float().square().sum() + weights.gate.penalty()
    if loss.requires_grad:
        loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in weights.parameters())


@cases
def test_penalty_and_telemetry(name: str, slot: str, history: bool) -> None:
    weights = make(name, slot, history).train()
    assert float(weights.gate.penalty()) == 0 or list(weights.parameters())
    found = weights(*inputs(slot))
    penalty = weights.gate.penalty()
    assert penalty.shape == ()
    assert penalty.isfinite()
    told = weights.gate.telemetry(found)
    assert {"mean", "std", "saturation", "entropy", "zeros", "importance", f"choice_{K - 1}"} <= set(told)
    assert all(abs(v) < float("inf") for v in told.values())
    torch.testing.assert_close(sum(told[f"choice_{k}"] for k in range(K)), K * told["mean"], rtol=1e-5, atol=1e-6)


@cases
def test_exported_it_is_the_same(name: str, slot: str, history: bool) -> None:
    weights, given = make(name, slot, history).eval(), inputs(slot)
    program = torch.export.export(weights, given)
    torch.testing.assert_close(program.module()(*given), weights(*given))


@cases
def test_traced_it_trains(name: str, slot: str, history: bool) -> None:
    torch._dynamo.reset()
    weights, given = make(name, slot, history).train(), inputs(slot)
    traced = torch.compile(weights, backend="eager", fullgraph=True)
    torch.manual_seed(2)
    expected, price = weights(*given), weights.gate.penalty()
    torch.manual_seed(2)
    torch.testing.assert_close(traced(*given), expected)
    torch.testing.assert_close(weights.gate.penalty(), price)


@pytest.mark.parametrize("name", [n for n in GATES if GATES[n].slots & {"expert", "interaction"}])
def test_compiled_it_is_the_same(name: str) -> None:
    torch._dynamo.reset()
    slot = min(GATES[name].slots & {"expert", "interaction"})
    weights, given = make(name, slot, slot == "expert").eval(), inputs(slot)
    compiled = torch.compile(weights, fullgraph=True)
    torch.testing.assert_close(compiled(*given), weights(*given), rtol=1e-5, atol=1e-6)
