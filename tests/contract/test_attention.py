"""What every registered gate must hold in slot attention: its weights, and its mask of what they bring."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ctr_models.gates import GATES, Gate, GateShape, GateSpec

B, H, L, D, C = 3, 2, 4, 3, 5
NAMES = [name for name in GATES if "attention" in GATES[name].slots]
every_gate = pytest.mark.parametrize("name", NAMES)
started_gate = pytest.mark.parametrize(
    "name", [n for n in NAMES if "identity" in get_args(GATES[n].Config.model_fields["start"].annotation)]
)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def make(name: str, *, seed: int = 0, **options: Any) -> Gate:
    torch.manual_seed(seed)
    shape = GateShape(slot="attention", width=D, context=C, fields=L, heads=H)
    return GateSpec.parse({"name": name, **options}).build(shape)


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Scores (B, H, L, L), values (B, H, L, D), layer input (B, L, C); row 1 has two keys, row 2 none."""
    generator = torch.Generator().manual_seed(1)
    scores, values, x = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in ((B, H, L, L), (B, H, L, D), (B, L, C))
    )
    scores[1, :, :, 2:] = -torch.inf
    scores[2] = -torch.inf
    return scores, values, x


class Heads(nn.Module):
    """What a layer of attention does with its gate."""

    def __init__(self, gate: Gate) -> None:
        super().__init__()
        self.gate = gate

    def forward(self, scores: Tensor, values: Tensor, x: Tensor) -> Tensor:
        return self.gate.gated(self.gate.attend(scores, x) @ values, x)


def control(scores: Tensor, values: Tensor) -> Tensor:
    present = scores.masked_fill(scores.isneginf(), -1e9).softmax(-1)
    return present.masked_fill(scores.isneginf(), 0) @ values


@every_gate
def test_absent_keys_get_nothing(name: str) -> None:
    scores, _, x = inputs()
    weights = make(name).attend(scores, x)
    assert weights.shape == scores.shape
    assert weights.dtype == scores.dtype
    assert weights.min() >= 0
    assert weights.max() <= 1
    assert (weights[scores.isneginf()] == 0).all()


@every_gate
def test_a_row_without_keys_is_zeros_and_passes_no_nan_back(name: str) -> None:
    gate, (scores, values, x) = make(name), inputs()
    for given in (scores, values, x):
        given.requires_grad_()
    out = Heads(gate)(scores, values, x)
    assert (out[2] == 0).all()
    out.square().sum().backward()
    for path, leaf in [("scores", scores), ("values", values), *gate.named_parameters()]:
        assert leaf.grad is not None, path
        assert leaf.grad.isfinite().all(), path
    assert (scores.grad[2] == 0).all()  # type: ignore[index]


@every_gate
def test_gradients_reach_every_parameter(name: str) -> None:
    gate, (scores, values, x) = make(name), inputs()
    values.requires_grad_()
    (Heads(gate)(scores, values, x) * torch.randn(values.shape)).sum().backward()
    for path, parameter in gate.named_parameters():
        assert parameter.grad is not None, path
        assert parameter.grad.abs().max() > 0, path


@every_gate
def test_gradients_are_right(name: str) -> None:
    heads, (scores, values, x) = Heads(make(name).double()), inputs(torch.float64)
    absent = scores[:2].isneginf()
    names = [n for n, _ in heads.named_parameters()]

    def run(s: Tensor, v: Tensor, c: Tensor, *weights: Tensor) -> Tensor:
        given = dict(zip(names, weights, strict=True))
        return torch.func.functional_call(heads, given, (s.masked_fill(absent, -torch.inf), v, c))

    leaves = [scores[:2].masked_fill(absent, 0), values[:2], x[:2], *(p.detach() for p in heads.parameters())]
    assert torch.autograd.gradcheck(run, [leaf.clone().requires_grad_() for leaf in leaves])


@started_gate
def test_started_as_the_identity_it_is_the_softmax(name: str) -> None:
    scores, values, x = inputs()
    out = Heads(make(name, start="identity"))(scores, values, x)
    torch.testing.assert_close(out, control(scores, values), rtol=0, atol=1e-6)


@started_gate
def test_started_as_the_identity_it_comes_to_differ(name: str) -> None:
    heads, (scores, values, x) = Heads(make(name, start="identity")), inputs()
    if not list(heads.parameters()) and type(heads.gate).anneal is Gate.anneal:
        return
    target = torch.randn(values.shape)
    for step in range(3):
        heads.gate.anneal((step + 1) / 3)
        if not list(heads.parameters()):
            continue
        heads.zero_grad()
        ((heads(scores, values, x) - target) ** 2).sum().backward()
        with torch.no_grad():
            for parameter in heads.parameters():
                parameter -= 0.1 * parameter.grad
    assert all(p.grad.abs().max() > 0 for p in heads.parameters())
    assert not torch.allclose(heads(scores, values, x), control(scores, values), atol=1e-4)


@every_gate
def test_a_row_does_not_depend_on_its_neighbours_nor_on_padding(name: str) -> None:
    heads, (scores, values, x) = Heads(make(name)).eval(), inputs()
    together = heads(scores, values, x)
    for i, keys in enumerate((4, 2, 1)):
        alone = heads(scores[i : i + 1, :, :, :keys], values[i : i + 1, :, :keys], x[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-5, atol=1e-6)


@every_gate
def test_one_query_and_one_key(name: str) -> None:
    gate, x = make(name), torch.randn(1, 1, C)
    assert Heads(gate)(torch.randn(1, H, 1, 1), torch.randn(1, H, 1, D), x).isfinite().all()


@every_gate
def test_it_survives_saving_in_the_middle_of_training(name: str, tmp_path: Path) -> None:
    gate, fresh = make(name, start="paper"), make(name, seed=1, start="paper")
    gate.anneal(0.3)
    save_file(gate.state_dict(), tmp_path / "gate.safetensors")
    fresh.load_state_dict(load_file(tmp_path / "gate.safetensors"))
    assert torch.equal(Heads(gate)(*inputs()), Heads(fresh)(*inputs()))


@every_gate
def test_exported_and_traced_it_is_the_same(name: str) -> None:
    torch._dynamo.reset()
    heads, given = Heads(make(name)).eval(), inputs()
    expected = heads(*given)
    torch.testing.assert_close(torch.export.export(heads, given).module()(*given), expected)
    compiled = torch.compile(heads, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*given), expected)


@every_gate
def test_bfloat16_is_near(name: str) -> None:
    heads, given = Heads(make(name)), inputs()
    exact = heads(*given)
    rough = heads.bfloat16()(*(g.bfloat16() for g in given))
    assert rough.dtype == torch.bfloat16
    torch.testing.assert_close(rough.float(), exact, rtol=0.05, atol=0.05)
