from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from ctr_models.errors import ConfigError
from ctr_models.gates import GateShape, GateSpec
from ctr_models.gates.comet import CometGate, nearest_permutation, sinkhorn, smooth_step, ways_to_leaves


def gate(choices: int = 2, width: int = 1, **options: object) -> CometGate:
    torch.manual_seed(0)
    shape = GateShape(slot="expert", width=width, choices=choices)
    built = GateSpec.parse({"name": "comet", **options}).build(shape)
    assert isinstance(built, CometGate)
    return built


def set_nodes(g: CometGate, nodes: list[float]) -> None:
    """Make u of each node, tree by tree, a constant, and all leaves alike."""
    with torch.no_grad():
        for parameter in (g.nodes.weight, g.leaves.weight, g.leaves.bias):
            parameter.zero_()
        g.nodes.bias.copy_(torch.tensor(nodes))


def test_one_node_by_hand() -> None:
    g, x = gate(k=1), torch.zeros(1, 1)
    set_nodes(g, [0.25])
    torch.testing.assert_close(g(x), torch.tensor([[0.84375, 0.15625]]))
    g = gate(k=1, band=2)
    set_nodes(g, [0.5])
    torch.testing.assert_close(g(x), torch.tensor([[0.84375, 0.15625]]))


def test_two_trees_share_by_hand() -> None:
    g = gate(k=2)
    set_nodes(g, [0.25, 0.0])
    torch.testing.assert_close(g(torch.zeros(1, 1)), torch.tensor([[0.671875, 0.328125]]))
    with torch.no_grad():
        g.leaves.bias.copy_(torch.tensor([0.0, 0.0, math.log(3), 0.0]))  # the second tree speaks up for its first
    expected = torch.tensor([[0.84375 + 1.5, 0.15625 + 0.5]]) / 3
    torch.testing.assert_close(g(torch.zeros(1, 1)), expected)


def test_three_experts_hang_on_two_nodes() -> None:
    """The root leads right to the first leaf, left to a node over the other two."""
    g = gate(choices=3, k=1)
    set_nodes(g, [0.25, 0.0])
    torch.testing.assert_close(g(torch.zeros(1, 1)), torch.tensor([[0.15625, 0.421875, 0.421875]]))


def test_the_step_is_smooth_and_flat_at_its_ends() -> None:
    u = torch.linspace(-1, 1, 201, dtype=torch.float64, requires_grad=True)
    s = smooth_step(u, 1.0)
    (slope,) = torch.autograd.grad(s.sum(), u)
    assert (s.diff() >= 0).all()
    assert not slope[u.detach().abs() >= 0.5].any()
    assert slope.diff().abs().max() < 0.07  # no jump: 6 * 0.01 at most
    torch.testing.assert_close(s + smooth_step(-u, 1.0), torch.ones_like(s))


@pytest.mark.parametrize("experts", range(2, 10))
def test_any_number_of_experts_fits(experts: int) -> None:
    g = gate(choices=experts, width=3)
    torch.nn.init.normal_(g.nodes.weight)
    weights = g(torch.randn(20, 3))
    torch.testing.assert_close(weights.sum(1), torch.ones(20))
    way, turns_left, on_way = ways_to_leaves(experts)
    routes = {
        tuple(sorted(zip(way[on, e].tolist(), turns_left[on, e].tolist(), strict=True)))
        for e in range(experts)
        for on in [on_way[:, e]]
    }
    assert len(routes) == experts  # no two leaves at one place
    assert on_way.sum(0).max() == math.ceil(math.log2(experts))


def test_decided_trees_leave_at_most_k_experts() -> None:
    g, x = gate(choices=8, width=3, k=2), torch.randn(200, 3)
    with torch.no_grad():
        g.nodes.weight.normal_().mul_(1000)
    used = (g(x) > 0).sum(1)
    assert used.max() == 2
    assert g.telemetry(g(x))["zeros"] >= 0.75


def test_the_entropy_penalty_by_hand() -> None:
    g = gate(k=2, entropy=0.5)
    set_nodes(g, [0.0, 5.0])  # one tree torn, one decided
    g.train()(torch.zeros(4, 1))
    torch.testing.assert_close(g.penalty(), torch.tensor(0.5 * math.log(2)), rtol=1e-4, atol=1e-5)
    assert float(g.penalty()) == 0


def test_the_entropy_penalty_makes_trees_decide() -> None:
    g, x = gate(choices=4, width=3, entropy=0.1), torch.randn(64, 3)
    optimizer = torch.optim.Adam(g.train().parameters(), lr=0.1)
    assert ((g.eval()(x) > 0).sum(1) == 4).all()
    g.train()
    for _ in range(60):
        optimizer.zero_grad()
        g(x)
        g.penalty().backward()
        optimizer.step()
    assert (g.eval()(x) > 0).float().sum(1).mean() < 2.5


def test_one_expert_is_no_choice() -> None:
    with pytest.raises(ConfigError, match="can't choose among 1 experts"):
        gate(choices=1)


def searched(**options: object) -> CometGate:
    return gate(choices=4, width=3, local_search=0.5, **options)


def test_the_order_is_soft_while_searched_and_hard_after() -> None:
    g, x = searched(), torch.randn(8, 3)
    plain = gate(choices=4, width=3)
    plain.load_state_dict({n: v for n, v in g.state_dict().items() if n.startswith(("nodes", "leaves"))})
    order = g.order
    assert order is not None
    g.train().anneal(0.0)
    torch.testing.assert_close(g(x), plain(x) @ sinkhorn(order / 0.05))
    torch.testing.assert_close(g.eval()(x), plain(x) @ nearest_permutation(order))
    g.train().anneal(0.5)
    torch.testing.assert_close(g(x), plain(x) @ nearest_permutation(order))
    with torch.no_grad():
        order.copy_(torch.eye(4).flip(0))
    fixed = g(x)
    g.anneal(0.9)
    assert torch.equal(g(x), fixed)  # after the search nothing moves any more


def test_the_temperature_falls_by_equal_factors() -> None:
    g, seen = searched(), []
    for done in (0.0, 0.1, 0.2, 0.3, 0.4):
        g.anneal(done)
        seen.append(float(g.temperature))
    assert seen[0] == pytest.approx(0.05)
    assert [b / a for a, b in pairwise(seen)] == pytest.approx([(0.001 / 0.05) ** 0.2] * 4, rel=1e-4)


def test_the_search_finds_an_order() -> None:
    g, x = searched(), torch.eye(4)[:, :3]
    with torch.no_grad():
        g.nodes.weight.normal_()
        g.leaves.weight.normal_(std=3)
    target_order = torch.eye(4)[torch.tensor([2, 0, 3, 1])]
    plain = gate(choices=4, width=3)
    plain.load_state_dict({n: v for n, v in g.state_dict().items() if n.startswith(("nodes", "leaves"))})
    target = plain(x).detach() @ target_order
    assert g.order is not None
    optimizer = torch.optim.Adam([g.order], lr=0.003)
    for step in range(200):
        g.train().anneal(step / 400)
        optimizer.zero_grad()
        ((g(x) - target) ** 2).sum().backward()
        optimizer.step()
    g.anneal(0.5)
    torch.testing.assert_close(g.eval()(x), target)


def test_the_found_order_survives_saving() -> None:
    g, x = searched(), torch.randn(8, 3)
    with torch.no_grad():
        g.order.copy_(torch.eye(4).flip(0))  # type: ignore[union-attr]
    g.anneal(0.2)
    other = searched()
    other.load_state_dict(g.state_dict())
    assert torch.equal(other.eval()(x), g.eval()(x))
    assert torch.equal(other.permutation, torch.eye(4).flip(0))


def test_sinkhorn_balances_rows_and_columns() -> None:
    matrix: Tensor = sinkhorn(torch.randn(6, 6))
    torch.testing.assert_close(matrix.sum(1), torch.ones(6))
    torch.testing.assert_close(matrix.sum(0), torch.ones(6), rtol=0, atol=1e-3)
