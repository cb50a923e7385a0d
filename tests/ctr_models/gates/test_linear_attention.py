from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ctr_models.gates import GateShape, GateSpec
from ctr_models.gates.linear_attention import LinearAttentionGate

LENGTHS = [3, 0, 1, 6]
OFFSETS = torch.tensor([0, 3, 3, 4, 10])


def make(width: int = 4, **options: object) -> LinearAttentionGate:
    torch.manual_seed(0)
    gate = GateSpec.parse({"name": "linear_attention", **options}).build(GateShape(slot="sequence", width=width))
    assert isinstance(gate, LinearAttentionGate)
    return gate


def step_by_step(gate: LinearAttentionGate, values: Tensor, state: Tensor) -> Tensor:
    """S_t = Diag(a_t) S_{t-1} + k_t u_t', one behaviour after the other."""
    for v in values:
        forget = torch.sigmoid(gate.forget(v)) ** (1 / gate.config.calm)
        state = forget.unsqueeze(1) * state + torch.outer(gate.key(v), gate.value(v))
    return state


def test_one_number_wide_it_can_be_done_by_hand() -> None:
    gate = make(width=1, calm=1.0, rank=1)
    with torch.no_grad():
        for weight, value in [(gate.query, 2.0), (gate.key, 3.0), (gate.value, 5.0)]:
            weight.weight.fill_(value)
        gate.forget[0].weight.fill_(1.0)
        gate.forget[1].weight.fill_(0.0)  # type: ignore[union-attr]
    values = torch.tensor([[1.0], [2.0]])  # S = 1/2 * (3 * 5) + 6 * 10 = 67.5; q = 2 * 7
    pooled = gate.pool(values, torch.tensor([1.0, 1.0]), torch.tensor([0, 2]), torch.tensor([[7.0]]))
    torch.testing.assert_close(pooled, torch.tensor([[0.5 * 3.0 + 0.5 * 14 * 67.5]]))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("keys", [0, 3])
def test_the_sum_is_the_recurrence(keys: int, fused: bool) -> None:
    gate, values, query = make(keys=keys, calm=2.0), torch.randn(10, 4), torch.randn(4, 4)
    gate.fused = fused
    zero = torch.zeros(keys or 4, 4)
    states = torch.stack([step_by_step(gate, history, zero) for history in values.split(LENGTHS)])
    torch.testing.assert_close(gate.state(values, OFFSETS), states)
    asked = gate.query(query) * (keys or 4) ** -0.5
    read = torch.einsum("bk,bkd->bd", asked, states)
    torch.testing.assert_close(gate.read(states, query), read)
    pooled = gate.pool(values, torch.zeros(10), OFFSETS, query)
    torch.testing.assert_close(pooled, gate.share() * read)


def test_a_state_can_be_kept_and_moved_on() -> None:
    gate, values = make(), torch.randn(10, 4)
    whole = gate.state(values, OFFSETS)
    early, late = [], []
    for history in values.split(LENGTHS):
        early.append(history[: len(history) // 2])
        late.append(history[len(history) // 2 :])
    state = gate.state(torch.cat(early), torch.tensor([0, 1, 1, 1, 4]))
    state = gate.state(torch.cat(late), torch.tensor([0, 2, 2, 3, 6]), before=state)
    torch.testing.assert_close(state, whole)


def test_one_state_serves_many_candidates() -> None:
    gate, values, candidates = make(), torch.randn(6, 4), torch.randn(5, 4)
    state = gate.state(values, torch.tensor([0, 6]))
    offsets = torch.arange(0, 36, 6)
    each = gate.pool(values.repeat(5, 1), torch.zeros(30), offsets, candidates)
    torch.testing.assert_close(gate.share() * gate.read(state, candidates), each)


def test_a_long_batch_does_not_blur_a_short_history() -> None:
    gate = make(calm=0.1)  # forgets fast: the running sum grows by some ten a behaviour
    long, short, query = torch.randn(20_000, 4), torch.randn(3, 4), torch.randn(2, 4)
    with torch.no_grad():
        both = gate.pool(torch.cat([long, short]), torch.zeros(20_003), torch.tensor([0, 20_000, 20_003]), query)
        alone = gate.pool(short, torch.zeros(3), torch.tensor([0, 3]), query[1:])
    torch.testing.assert_close(both[1:], alone)


def test_the_memory_starts_long() -> None:
    gate, values = make(), torch.zeros(1, 4)
    torch.testing.assert_close(gate._log_forget(values).exp(), torch.full((1, 4), 0.5 ** (1 / 16)))
