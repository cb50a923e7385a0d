from __future__ import annotations

import pytest
import torch

from ctr_models.gates import GateShape, GateSpec
from ctr_models.gates.attention_weighted import AttentionWeightedGate


def gate(width: int = 3, context: int = 4, choices: int = 2, **options: object) -> AttentionWeightedGate:
    torch.manual_seed(0)
    shape = GateShape(slot="expert", width=width, context=context, choices=choices)
    built = GateSpec.parse({"name": "attention_weighted", **options}).build(shape)
    assert isinstance(built, AttentionWeightedGate)
    return built


def test_by_hand() -> None:
    """a(h) = 2 relu(h), z(h) = (relu(h), 3 relu(h) + 1), b = (1/2, 0)."""
    g = gate(context=1, hidden=1)
    with torch.no_grad():
        for parameter in g.parameters():
            parameter.zero_()
        g.of_behaviour.weight.fill_(1)
        g.activation_unit.weight.fill_(2)
        g.gate_unit.weight.copy_(torch.tensor([[1.0], [3.0]]))
        g.gate_unit.bias.copy_(torch.tensor([0.0, 1.0]))
        g.bias.copy_(torch.tensor([0.5, 0.0]))
        g.fallback.bias.copy_(torch.tensor([7.0, 8.0]))
    values, offsets = torch.tensor([[1.0], [2.0], [-3.0]]), torch.tensor([0, 2, 2, 3])
    found = g.mixture(torch.zeros(3, 3), values, offsets, torch.randn(3, 1))
    torch.testing.assert_close(found, torch.tensor([[10.5, 36.0], [7.0, 8.0], [0.5, 0.0]]))


def test_it_is_the_sum_over_behaviours_compared_with_the_candidate() -> None:
    g, x, query = gate(activation="tanh"), torch.randn(2, 3), torch.randn(2, 4)
    values, offsets = torch.randn(5, 4), torch.tensor([0, 3, 5])
    found = g.mixture(x, values, offsets, query)
    for i, history in enumerate((values[:3], values[3:])):
        total = g.bias
        for h in history:
            met = g.of_behaviour(h) + g.of_query(query[i]) + g.of_both(h * query[i])
            of_a, of_z = torch.tanh(met).chunk(2)
            total = total + g.activation_unit(of_a) * g.gate_unit(of_z)
        torch.testing.assert_close(found[i], total)


def test_the_order_of_behaviours_does_not_matter() -> None:
    g, x, query, values = gate(), torch.randn(1, 3), torch.randn(1, 4), torch.randn(6, 4)
    offsets = torch.tensor([0, 6])
    torch.testing.assert_close(
        g.mixture(x, values, offsets, query), g.mixture(x, values.flip(0), offsets, query), rtol=1e-5, atol=1e-5
    )


def test_without_a_history_the_row_decides() -> None:
    g, x = gate(), torch.randn(2, 3)
    empty = torch.zeros(3, dtype=torch.int64)
    torch.testing.assert_close(g.mixture(x, torch.empty(0, 4), empty, torch.randn(2, 4)), g(x))
    torch.testing.assert_close(g(x), x @ g.fallback.weight.T + 0.5)


def test_a_model_without_histories_pays_for_none() -> None:
    g, x = gate(context=0), torch.randn(2, 3)
    assert {n for n, _ in g.named_parameters()} == {"fallback.weight", "fallback.bias"}
    given = torch.randn(4, 4), torch.tensor([0, 2, 4]), torch.randn(2, 4)
    assert torch.equal(g.mixture(x, *given), g(x))


def test_a_history_moves_no_other_row() -> None:
    g, x, query = gate(), torch.randn(2, 3), torch.randn(2, 4)
    values, offsets = torch.randn(5, 4), torch.tensor([0, 3, 5])
    before = g.mixture(x, values, offsets, query)
    after = g.mixture(x, torch.cat([values[:3], torch.randn(2, 4)]), offsets, query)
    assert torch.equal(before[0], after[0])
    assert not torch.equal(before[1], after[1])


@pytest.mark.parametrize("count", [100, 10000])
def test_long_histories_keep_their_bits_in_bfloat16(count: int) -> None:
    g, x, query = gate(), torch.randn(1, 3), torch.randn(1, 4)
    values, offsets = torch.randn(1, 4).expand(count, 4), torch.tensor([0, count])
    exact = g.mixture(x, values, offsets, query)
    rough = g.bfloat16().mixture(x.bfloat16(), values.bfloat16(), offsets, query.bfloat16())
    torch.testing.assert_close(rough.float(), exact, rtol=0.03, atol=0.5)


def test_its_attention_is_how_far_a_behaviour_alone_moves_the_weights() -> None:
    torch.manual_seed(0)
    gate = GateSpec(name="attention_weighted").build(GateShape(slot="expert", width=3, context=4, choices=2))
    values, offsets, query = torch.randn(5, 4), torch.arange(6), torch.randn(5, 4)  # one behaviour a row
    moved = gate.mixture(torch.randn(5, 3), values, offsets, query) - gate.bias
    torch.testing.assert_close(gate.attention(values, offsets, query), moved.norm(dim=1))
