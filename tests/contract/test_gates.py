"""What every registered gate must hold in every slot that it lists. Nothing here knows a gate by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ctr_models.errors import ConfigError
from ctr_models.gates import GATES, SLOTS, Gate, GateShape, GateSpec

B, F, D, C = 8, 5, 6, 4
SHAPES: dict[str, tuple[int, ...]] = {
    "feature": (B, D),
    "cross": (B, D),
    "fusion": (B, D),
    "field": (B, F, D),
    "selection": (B, F, D),
    "sequence": (B, F, D),
    "attention": (B, 2, F, D),
}
HOOKS = {"attention": "attend", "sequence": "pool"}


def acts_by_a_hook(name: str, slot: str) -> bool:
    """Whether the gate leaves the mask alone: test_attention.py and test_sequence.py see to those."""
    hook = HOOKS.get(slot, "forward")
    return hook != "forward" and getattr(GATES[name], hook) is not getattr(Gate, hook)


PAIRS = [(name, slot) for name in GATES for slot in sorted(GATES[name].slots) if not acts_by_a_hook(name, slot)]
MASKS = [
    pytest.param(name, slot, context, id=f"{name}-{slot}-{'context' if context else 'alone'}")
    for name, slot in PAIRS
    if slot in SHAPES
    for context in (0, C)
]
masks = pytest.mark.parametrize(("name", "slot", "context"), MASKS)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def make(name: str, slot: str, context: int, *, seed: int = 0, **options: Any) -> Gate:
    torch.manual_seed(seed)
    spec = GateSpec.parse({"name": name, **options})
    return spec.build(GateShape(slot=slot, width=D, context=context, fields=F, heads=2))  # type: ignore[arg-type]


def inputs(slot: str, context: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(SHAPES[slot], generator=generator, dtype=torch.float64)
    c = torch.randn(
        (B, F, context) if slot == "attention" else (B, context), generator=generator, dtype=torch.float64
    )
    return x.to(dtype), c.to(dtype) if context else None


class Gated(nn.Module):
    """``gated`` as a forward, for the compilers."""

    def __init__(self, gate: Gate) -> None:
        super().__init__()
        self.gate = gate

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        return self.gate.gated(x, context)


@pytest.mark.parametrize("name", list(GATES))
def test_it_lists_slots_that_exist(name: str) -> None:
    assert GATES[name].slots
    assert GATES[name].slots <= set(SLOTS)
    assert GATES[name].name == name


@masks
def test_gated_is_x_times_the_mask(name: str, slot: str, context: int) -> None:
    gate, (x, c) = make(name, slot, context), inputs(slot, context)
    mask, gated = gate(x, c), gate.gated(x, c)
    assert torch.broadcast_shapes(mask.shape, x.shape) == x.shape
    assert gated.shape == x.shape
    assert gated.dtype == mask.dtype == x.dtype
    torch.testing.assert_close(gated, x * mask)


@masks
def test_the_mask_stays_in_its_range(name: str, slot: str, context: int) -> None:
    for start in ("paper", "identity"):
        gate, (x, c) = make(name, slot, context, start=start), inputs(slot, context)
        with torch.no_grad():
            for parameter in gate.parameters():
                parameter.add_(torch.randn_like(parameter))
        mask = gate(100 * x, c if c is None else 100 * c)
        assert mask.min() >= 0
        assert mask.max() <= gate.bound


@masks
def test_gradients_reach_every_parameter(name: str, slot: str, context: int) -> None:
    gate, (x, c) = make(name, slot, context), inputs(slot, context)
    x.requires_grad_()
    (gate.gated(x, c) * torch.randn(x.shape)).sum().backward()
    for path, parameter in [("x", x), *gate.named_parameters()]:
        assert parameter.grad is not None, path
        assert parameter.grad.isfinite().all(), path
        assert parameter.grad.abs().max() > 0, path


@masks
def test_gradients_are_right(name: str, slot: str, context: int) -> None:
    gate, (x, c) = make(name, slot, context).double(), inputs(slot, context, torch.float64)
    x = x[:3].requires_grad_()
    given = (x,) if c is None else (x, c[:3].requires_grad_())
    names = [n for n, _ in gate.named_parameters()]
    wrapped = Gated(gate)

    def gated(*values: Tensor) -> Tensor:
        weights = {f"gate.{n}": v for n, v in zip(names, values[len(given) :], strict=True)}
        return torch.func.functional_call(wrapped, weights, (values[0], None if c is None else values[1]))

    assert torch.autograd.gradcheck(gated, (*given, *(p.detach().requires_grad_() for p in gate.parameters())))


@masks
def test_started_as_the_identity_it_changes_nothing(name: str, slot: str, context: int) -> None:
    gate, (x, c) = make(name, slot, context, start="identity"), inputs(slot, context)
    torch.testing.assert_close(gate(x, c).expand_as(x), torch.ones_like(x), rtol=0, atol=1e-6)
    torch.testing.assert_close(gate.gated(x, c), x, rtol=0, atol=1e-6)


@masks
def test_started_as_the_identity_it_can_still_learn(name: str, slot: str, context: int) -> None:
    gate, (x, c) = make(name, slot, context, start="identity"), inputs(slot, context)
    if not list(gate.parameters()):
        return
    target = torch.randn(x.shape)
    for _ in range(3):
        gate.zero_grad()
        ((gate.gated(x, c) - target) ** 2).sum().backward()
        with torch.no_grad():
            for parameter in gate.parameters():
                parameter -= 0.01 * parameter.grad
    assert all(p.grad.abs().max() > 0 for p in gate.parameters())


@masks
def test_one_seed_gives_one_gate(name: str, slot: str, context: int) -> None:
    x, c = inputs(slot, context)
    first, second = make(name, slot, context).gated(x, c), make(name, slot, context).gated(x, c)
    assert torch.equal(first, second)


@masks
def test_a_row_does_not_depend_on_its_neighbours(name: str, slot: str, context: int) -> None:
    gate, (x, c) = make(name, slot, context).eval(), inputs(slot, context)
    together = gate.gated(x, c)
    alone = torch.cat([gate.gated(x[i : i + 1], None if c is None else c[i : i + 1]) for i in range(B)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


@masks
def test_one_context_serves_all_rows(name: str, slot: str, context: int) -> None:
    gate, (x, c) = make(name, slot, context), inputs(slot, context)
    if c is None:
        return
    constant = c[:1]
    torch.testing.assert_close(gate.gated(x, constant), gate.gated(x, constant.expand(c.shape)))


@masks
def test_it_survives_saving(name: str, slot: str, context: int, tmp_path: Path) -> None:
    gate, (x, c) = make(name, slot, context, seed=0), inputs(slot, context)
    fresh = make(name, slot, context, seed=1)
    save_file(gate.state_dict(), tmp_path / "gate.safetensors")
    fresh.load_state_dict(load_file(tmp_path / "gate.safetensors"))
    assert torch.equal(gate.gated(x, c), fresh.gated(x, c))


@masks
def test_bfloat16_is_near(name: str, slot: str, context: int) -> None:
    gate, (x, c) = make(name, slot, context), inputs(slot, context)
    exact = gate.gated(x, c)
    rough = gate.bfloat16().gated(x.bfloat16(), None if c is None else c.bfloat16())
    assert rough.dtype == torch.bfloat16
    torch.testing.assert_close(rough.float(), exact, rtol=0.05, atol=0.05)


@masks
def test_penalty_and_telemetry(name: str, slot: str, context: int) -> None:
    gate, (x, c) = make(name, slot, context), inputs(slot, context)
    assert gate.penalty().shape == ()
    assert gate.penalty().isfinite()
    told = gate.telemetry(gate(x, c))
    assert {"mean", "std", "saturation", "entropy"} <= set(told)
    assert all(abs(v) < float("inf") for v in told.values())
    assert 0 <= told["mean"] <= gate.bound


@masks
def test_a_wrong_width_is_refused(name: str, slot: str, context: int) -> None:
    gate, (x, c) = make(name, slot, context), inputs(slot, context)
    if c is not None and list(gate.parameters()):
        with pytest.raises(RuntimeError):
            gate.gated(x, torch.cat([c, c], dim=-1))


@masks
def test_exported_it_is_the_same(name: str, slot: str, context: int) -> None:
    gate, (x, c) = make(name, slot, context).eval(), inputs(slot, context)
    program = torch.export.export(Gated(gate), (x, c))
    torch.testing.assert_close(program.module()(x, c), gate.gated(x, c))


@masks
def test_traced_it_is_the_same(name: str, slot: str, context: int) -> None:
    torch._dynamo.reset()
    gate, (x, c) = make(name, slot, context).eval(), inputs(slot, context)
    compiled = torch.compile(Gated(gate), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, c), gate.gated(x, c))


@pytest.mark.parametrize("name", sorted({name for name, slot in PAIRS if slot in SHAPES}))
def test_compiled_it_is_the_same(name: str) -> None:
    torch._dynamo.reset()
    slot = min(s for n, s in PAIRS if n == name and s in SHAPES)
    gate, (x, c) = make(name, slot, C), inputs(slot, C)
    compiled = torch.compile(Gated(gate), fullgraph=True)
    torch.testing.assert_close(compiled(x, c), gate.gated(x, c))


@pytest.mark.parametrize("name", list(GATES))
def test_a_misspelt_option_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=r"^strat: unknown key.*did you mean 'start'"):
        GateSpec.parse({"name": name, "strat": "identity"})


@pytest.mark.parametrize("name", list(GATES))
def test_a_slot_that_it_does_not_fit_is_refused(name: str) -> None:
    for slot in set(SLOTS) - GATES[name].slots:
        with pytest.raises(ConfigError, match=f"gate '{name}' does not fit slot '{slot}'"):
            make(name, slot, 0)


@pytest.mark.parametrize("name", list(GATES))
def test_the_hash_tells_settings_apart(name: str) -> None:
    plain = GateSpec(name=name)
    assert plain.hash == GateSpec.parse({"name": name, "start": "paper"}).hash
    if "identity" in get_args(GATES[name].Config.model_fields["start"].annotation):
        assert plain.hash != GateSpec.parse({"name": name, "start": "identity"}).hash
