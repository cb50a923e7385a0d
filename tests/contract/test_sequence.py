"""What every registered gate must hold in slot sequence: how it pools jagged histories."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from ctr_models.gates import GATES, Gate, GateShape, GateSpec

D = 3
OFFSETS = torch.tensor([0, 3, 3, 4, 9, 9])  # histories of 3, 0, 1, 5 and 0
NAMES = [name for name in GATES if "sequence" in GATES[name].slots]
every_gate = pytest.mark.parametrize("name", NAMES)
started_gate = pytest.mark.parametrize(
    "name", [n for n in NAMES if "identity" in get_args(GATES[n].Config.model_fields["start"].annotation)]
)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def make(name: str, *, seed: int = 0, width: int = D, **options: Any) -> Gate:
    torch.manual_seed(seed)
    return GateSpec.parse({"name": name, **options}).build(GateShape(slot="sequence", width=width, context=width))


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    values, scores, query = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in ((9, D), (9,), (5, D))
    )
    return values, scores, OFFSETS, query


class Pool(nn.Module):
    """``pool`` as a forward, for the compilers."""

    def __init__(self, gate: Gate) -> None:
        super().__init__()
        self.gate = gate

    def forward(self, values: Tensor, scores: Tensor, offsets: Tensor, query: Tensor) -> Tensor:
        return self.gate.pool(values, scores, offsets, query)


@every_gate
def test_a_history_gives_a_vector_and_an_empty_one_zeros(name: str) -> None:
    values, scores, offsets, query = inputs()
    pooled = make(name).pool(values, scores, offsets, query)
    assert pooled.shape == query.shape
    assert pooled.dtype == values.dtype
    assert (pooled[[1, 4]] == 0).all()
    assert (pooled[[0, 2, 3]] != 0).all()


@every_gate
@pytest.mark.parametrize("rows", [1, 4])
def test_no_history_at_all(name: str, rows: int) -> None:
    gate = make(name)
    values, scores = torch.empty(0, D, requires_grad=True), torch.empty(0, requires_grad=True)
    pooled = gate.pool(values, scores, torch.zeros(rows + 1, dtype=torch.int64), torch.randn(rows, D))
    assert torch.equal(pooled, torch.zeros(rows, D))
    (pooled.sum() + sum(p.sum() for p in gate.parameters())).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in gate.parameters())


@every_gate
def test_a_row_does_not_depend_on_its_neighbours(name: str) -> None:
    gate, (values, scores, offsets, query) = make(name).eval(), inputs()
    together = gate.pool(values, scores, offsets, query)
    for i, (begin, end) in enumerate(zip(offsets.tolist(), offsets.tolist()[1:], strict=False)):
        alone = gate.pool(values[begin:end], scores[begin:end], torch.tensor([0, end - begin]), query[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-5, atol=1e-6)


@every_gate
def test_offsets_may_be_int32(name: str) -> None:
    gate, (values, scores, offsets, query) = make(name), inputs()
    assert torch.equal(gate.pool(values, scores, offsets.int(), query), gate.pool(values, scores, offsets, query))


@every_gate
def test_gradients_reach_every_parameter_and_the_scores(name: str) -> None:
    gate, (values, scores, offsets, query) = make(name), inputs()
    values.requires_grad_()
    scores.requires_grad_()
    (gate.pool(values, scores, offsets, query) * torch.randn(5, D)).sum().backward()
    for path, leaf in [("values", values), ("scores", scores), *gate.named_parameters()]:
        assert leaf.grad is not None, path
        assert leaf.grad.isfinite().all(), path
        assert leaf.grad.abs().max() > 0, path


@every_gate
def test_gradients_are_right(name: str) -> None:
    pool, (values, scores, offsets, query) = Pool(make(name).double()), inputs(torch.float64)
    names = [n for n, _ in pool.named_parameters()]

    def run(v: Tensor, s: Tensor, q: Tensor, *weights: Tensor) -> Tensor:
        return torch.func.functional_call(pool, dict(zip(names, weights, strict=True)), (v, s, offsets, q))

    leaves = [values, scores, query, *(p.detach() for p in pool.parameters())]
    assert torch.autograd.gradcheck(run, [leaf.clone().requires_grad_() for leaf in leaves])


@started_gate
def test_started_as_the_identity_it_is_the_weighted_sum(name: str) -> None:
    values, scores, offsets, query = inputs()
    histories = (values * scores.unsqueeze(1)).split(offsets.diff().tolist())
    control = torch.stack([h.sum(0) for h in histories])
    pooled = make(name, start="identity").pool(values, scores, offsets, query)
    torch.testing.assert_close(pooled, control, rtol=0, atol=1e-6)


@started_gate
def test_started_as_the_identity_it_can_still_learn(name: str) -> None:
    gate, given = make(name, start="identity"), inputs()
    if not list(gate.parameters()):
        return
    target = torch.randn(5, D)
    for _ in range(3):
        gate.zero_grad()
        ((gate.pool(*given) - target) ** 2).sum().backward()
        with torch.no_grad():
            for parameter in gate.parameters():
                parameter -= 0.01 * parameter.grad
    assert all(p.grad.abs().max() > 0 for p in gate.parameters())


@every_gate
def test_it_survives_saving(name: str, tmp_path: Path) -> None:
    gate, fresh = make(name), make(name, seed=1)
    save_file(gate.state_dict(), tmp_path / "gate.safetensors")
    fresh.load_state_dict(load_file(tmp_path / "gate.safetensors"))
    assert torch.equal(gate.pool(*inputs()), fresh.pool(*inputs()))


@every_gate
def test_exported_and_traced_it_is_the_same_for_any_histories(name: str) -> None:
    torch._dynamo.reset()
    pool, given = Pool(make(name)).eval(), inputs()
    total, rows = torch.export.Dim("total"), torch.export.Dim("rows")
    program = torch.export.export(
        pool, given, dynamic_shapes=({0: total}, {0: total}, {0: rows + 1}, {0: rows})
    ).module()
    other = (torch.randn(4, D), torch.randn(4), torch.tensor([0, 0, 4]), torch.randn(2, D))
    for batch in (given, other):
        torch.testing.assert_close(program(*batch), pool(*batch))
    compiled = torch.compile(pool, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*given), pool(*given))


@every_gate
def test_bfloat16_is_near(name: str) -> None:
    gate, (values, scores, offsets, query) = make(name), inputs()
    exact = gate.pool(values, scores, offsets, query)
    rough = gate.bfloat16().pool(values.bfloat16(), scores.bfloat16(), offsets, query.bfloat16())
    assert rough.dtype == torch.bfloat16
    torch.testing.assert_close(rough.float(), exact, rtol=0.05, atol=0.05)


class Recall(nn.Module):
    """Multi-query associative recall: a history of (key, value) pairs is asked for the value of each of its keys.

    A behaviour carries a key and a value side by side, a query carries a key. The scores that a model's own
    attention would give are all one: what is found is found by the gate.

    Source: Zoology, arXiv 2312.04927.
    """

    KEYS, VALUES, PAIRS = 10, 5, 5

    def __init__(self, gate: Gate, width: int) -> None:
        super().__init__()
        self.keys, self.values = nn.Embedding(self.KEYS, width // 2), nn.Embedding(self.VALUES, width // 2)
        self.gate, self.head = gate, nn.Linear(width, self.VALUES)

    def forward(self, keys: Tensor, values: Tensor) -> Tensor:
        """Map (B, PAIRS) keys and values to logits of the value of each key, (B, PAIRS, VALUES)."""
        behaviours = torch.cat([self.keys(keys), self.values(values)], dim=2)  # (B, PAIRS, D)
        asked = F.pad(self.keys(keys), (0, behaviours.shape[2] // 2)).flatten(0, 1)  # (B PAIRS, D)
        each = behaviours.repeat_interleave(self.PAIRS, dim=0).flatten(0, 1)  # a history a query
        offsets = torch.arange(0, len(each) + 1, self.PAIRS)
        return self.head(self.gate.pool(each, torch.ones(len(each)), offsets, asked)).unflatten(0, keys.shape)

    def pairs(self, rows: int) -> tuple[Tensor, Tensor]:
        keys = torch.rand(rows, self.KEYS).argsort(1)[:, : self.PAIRS]
        return keys, torch.randint(self.VALUES, keys.shape)


def recall_of(name: str, steps: int = 300) -> float:
    """Train a gate on recall; return the share of right answers on new histories."""
    width = 32
    gate = make(name, width=width)
    model = Recall(gate, width)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(steps):
        keys, values = model.pairs(64)
        optimizer.zero_grad()
        F.cross_entropy(model(keys, values).flatten(0, 1), values.flatten()).backward()
        optimizer.step()
    with torch.no_grad():
        keys, values = model.pairs(256)
        return float((model(keys, values).argmax(2) == values).float().mean())


@pytest.mark.parametrize("name", [name for name in NAMES if GATES[name].recalls])
def test_a_gate_that_claims_recall_has_it(name: str) -> None:
    assert recall_of(name) > 0.95


def test_recall_is_not_had_for_nothing() -> None:
    """Without a look at the query, nothing beats the most frequent value of a history by far."""
    assert recall_of("none") < 0.6
