from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ctr_models.errors import ConfigError
from ctr_models.gates import GateSpec
from ctr_models.layers import MLP, Exits, ExitsConfig, MLPConfig, Passage

GATE = GateSpec(name="adaptive_depth")


def make(*, gate: GateSpec = GATE, inputs: int = 4, hidden: tuple[int, ...] = (8, 6, 5), **options: float) -> tuple:
    torch.manual_seed(0)
    tower = MLP(inputs, MLPConfig(hidden=hidden), outputs=1)
    return tower, Exits(tower, gate, ExitsConfig(**options))


def passage(logits: list[list[float]], on: list[list[float]]) -> Passage:
    return Passage(torch.tensor(logits), torch.tensor(on))


def test_the_shares_are_those_of_leaving_for_the_first_time() -> None:
    p = passage([[0.0] * 3], [[0.9, 0.2]])
    torch.testing.assert_close(p.shares(), torch.tensor([[0.1, 0.72, 0.18]]))


def test_a_row_takes_the_first_exit_that_is_more_likely_than_not() -> None:
    p = passage([[1.0, 2.0, 3.0]] * 4, [[0.9, 0.2], [0.4, 0.9], [0.5, 0.5], [0.1, 0.1]])
    assert p.exits().tolist() == [1, 0, 2, 0]
    assert p.taken().tolist() == [2.0, 1.0, 3.0, 1.0]


def test_the_loss_is_expected_loss_and_cost_with_supervision() -> None:
    _, exits = make(hidden=(8, 6), cost=0.1, supervision=0.5)
    p, label = passage([[0.0, 2.0], [-1.0, 1.0]], [[0.75], [0.25]]), torch.tensor([1.0, 0.0])
    ce = [[math.log(2), math.log1p(math.exp(-2))], [math.log1p(math.exp(-1)), math.log1p(math.exp(1))]]
    first = exits.costs[0]
    one = 0.25 * (ce[0][0] + 0.1 * first) + 0.75 * (ce[0][1] + 0.1)
    two = 0.75 * (ce[1][0] + 0.1 * first) + 0.25 * (ce[1][1] + 0.1)
    expected = (one + two) / 2 + 0.5 * (sum(ce[0]) + sum(ce[1])) / 4
    assert exits.loss(p, label).item() == pytest.approx(expected, abs=1e-6)


def test_an_exit_costs_the_multiplications_up_to_it() -> None:
    _, exits = make(inputs=4, hidden=(8, 6, 5))
    total = 4 * 8 + 8 * 6 + 6 * 5 + 5
    assert exits.costs == [(4 * 8 + 8) / total, (4 * 8 + 8 * 6 + 6) / total, 1.0]


def test_the_last_exit_is_the_tower() -> None:
    tower, exits = make()
    x = torch.randn(7, 4)
    assert torch.equal(exits(tower, x).logits[:, 2:], tower(x))


@pytest.mark.parametrize("bias", [-100.0, 0.0, 100.0])
def test_leaving_early_gives_the_same_with_less(bias: float) -> None:
    torch.manual_seed(0)
    tower = MLP(4, MLPConfig(hidden=(8, 6, 5), batch_norm=True, dropout=0.5), outputs=1).eval()
    exits = Exits(tower, GATE, ExitsConfig()).eval()
    with torch.no_grad():
        for gate in exits.gates:
            gate.linear.bias.fill_(bias)
    p = exits(tower, x := torch.randn(40, 4))
    assert len(p.exits().unique()) == (1 if bias else 3)
    seen: list[int] = []
    hook = tower[-1].register_forward_hook(lambda _m, given, _out: seen.append(len(given[0])))
    torch.testing.assert_close(exits.early(tower, x), p.taken())
    hook.remove()
    assert sum(seen) == (p.exits() == 2).sum()


def test_a_gate_moves_neither_the_layers_nor_the_exits() -> None:
    tower, exits = make()
    exits(tower, torch.randn(7, 4)).on.sum().backward()
    assert all(p.grad is None for p in [*tower.parameters(), *exits.heads.parameters()])
    assert all(p.grad is not None for p in exits.gates.parameters())


def test_the_control_takes_every_row_through() -> None:
    tower, exits = make(gate=GateSpec(name="none"))
    p = exits(tower, torch.randn(7, 4))
    assert p.exits().tolist() == [2] * 7
    assert torch.equal(p.shares(), torch.tensor([[0.0, 0.0, 1.0]]).expand(7, 3))


def test_one_hidden_layer_has_no_depth() -> None:
    with pytest.raises(ConfigError, match=r"model.mlp.hidden: a tower of one hidden layer"):
        make(hidden=(8,))


def test_the_report_is_by_exit() -> None:
    _, exits = make(hidden=(8, 6))
    p = passage([[0.0, 9.0], [0.0, 9.0], [9.0, 0.0]], [[0.1], [0.1], [0.9]])
    told = exits.report(p, torch.tensor([1.0, 1.0, 0.0]))
    assert told["total"]["cost"] == pytest.approx((2 * exits.costs[0] + 1) / 3)
    assert told["0"]["share"] == pytest.approx(2 / 3)
    assert (told["0"]["predicted"], told["0"]["observed"], told["0"]["ece"]) == pytest.approx((0.5, 1.0, 0.5))
    assert (told["1"]["predicted"], told["1"]["observed"], told["1"]["ece"]) == pytest.approx((0.5, 0.0, 0.5))
    assert told["0"]["ece_all"] == pytest.approx((0.5 + 0.5 + torch.sigmoid(torch.tensor(9.0)).item()) / 3)


def test_an_exit_that_nobody_takes_has_no_rates() -> None:
    _, exits = make(hidden=(8, 6))
    told = exits.report(passage([[0.0, 0.0]], [[0.9]]), torch.tensor([1.0]))
    assert set(told["0"]) == {"share", "ece_all"}


def easy_and_hard(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Clicks by the sign of a coordinate for easy rows, by the parity of three for hard ones."""
    x = torch.randn(rows, 5)
    hard = x[:, 0] > 0
    x[:, 0] = torch.where(hard, 1.0, -1.0)
    label = torch.where(hard, (x[:, 1:4] > 0).sum(1) % 2, (x[:, 4] > 0).long()).float()
    return x, label, hard


def trained(cost: float) -> tuple[float, float, float]:
    """Return the mean exit of easy and of hard rows, and the log loss of the exits taken."""
    gate = GateSpec.parse({"name": "adaptive_depth", "warm": 0.5})
    tower, exits = make(gate=gate, inputs=5, hidden=(16, 32, 32), cost=cost)
    optimizer = torch.optim.Adam([*tower.parameters(), *exits.parameters()], lr=0.01)
    for step in range(400):
        for gate in exits.gates:
            gate.anneal(step / 400)
        x, label, _ = easy_and_hard(256)
        optimizer.zero_grad()
        exits.loss(exits(tower, x), label).backward()
        optimizer.step()
    x, label, hard = easy_and_hard(2000)
    with torch.no_grad():
        p = exits(tower, x)
    taken = p.exits().float()
    loss = F.binary_cross_entropy_with_logits(p.taken(), label)
    return float(taken[~hard].mean()), float(taken[hard].mean()), float(loss)


def test_hard_rows_go_deeper_and_a_higher_price_keeps_rows_shallow() -> None:
    torch.set_num_threads(1)
    easy, hard, loss = trained(cost=0.3)
    assert easy < 0.3
    assert hard > 0.7
    assert loss < 0.4
    dear_easy, dear_hard, _ = trained(cost=10.0)
    assert dear_easy == dear_hard == 0
