from __future__ import annotations

import itertools

import torch

from ctr_models.gates import GateSpec
from ctr_models.layers import CrossNetwork, VectorCrossNetwork


def test_it_is_the_equation() -> None:
    torch.manual_seed(0)
    network, c0 = CrossNetwork(5, layers=3, gate=GateSpec(name="sigmoid")), torch.randn(4, 5)
    c = c0
    for crossing, gate in zip(network.linears, network.gates, strict=True):
        c = c0 * (c @ crossing.weight.T + crossing.bias) * torch.sigmoid(c @ gate.linear.weight.T) + c
    torch.testing.assert_close(network(c0), c)


def test_each_layer_has_two_matrices_and_one_bias() -> None:
    network = CrossNetwork(7, layers=3, gate=GateSpec(name="sigmoid"))
    assert sum(p.numel() for p in network.parameters()) == 3 * (2 * 7 * 7 + 7)
    ungated = CrossNetwork(7, layers=3, gate=GateSpec(name="none"))
    assert sum(p.numel() for p in ungated.parameters()) == 3 * (7 * 7 + 7)


def test_biases_start_at_zero_so_that_deep_stacks_keep_their_scale() -> None:
    torch.manual_seed(0)
    network = CrossNetwork(16, layers=16, gate=GateSpec(name="sigmoid"))
    assert not any(layer.bias.any() for layer in network.linears)
    c0 = 0.01 * torch.randn(64, 16)
    assert (network(c0).std() / c0.std()).item() < 1.5


def test_l_layers_reach_order_l_plus_one() -> None:
    torch.manual_seed(0)
    network, x = CrossNetwork(3, layers=2, gate=GateSpec(name="none")).double(), torch.randn(1, 3).double()
    # A polynomial of degree 3 has a constant third difference, and none of degree 4.
    values = [network(step * x) for step in range(6)]
    for _ in range(3):
        values = [b - a for a, b in itertools.pairwise(values)]
    torch.testing.assert_close(values[0], values[1])
    torch.testing.assert_close(values[1], values[2])
    assert values[0].abs().max() > 1e-6


def test_the_vector_form_is_its_equation() -> None:
    torch.manual_seed(0)
    network, c0 = VectorCrossNetwork(5, layers=3, gate=GateSpec(name="none")), torch.randn(4, 5)
    c = c0
    with torch.no_grad():
        for crossing, bias in zip(network.linears, network.biases, strict=True):
            bias.normal_()
            c = torch.stack([x0 * torch.dot(crossing.weight[0], x) + bias + x for x0, x in zip(c0, c, strict=True)])
    torch.testing.assert_close(network(c0), c)
    assert sum(p.numel() for p in network.parameters()) == 3 * (5 + 5)


def test_the_vector_form_by_hand() -> None:
    network = VectorCrossNetwork(2, layers=1, gate=GateSpec(name="none"))
    with torch.no_grad():
        network.linears[0].weight.copy_(torch.tensor([[1.0, 2.0]]))
        network.biases[0].copy_(torch.tensor([0.5, -0.5]))
    # w . c = 3 + 2 * 4 = 11; 11 * 3 + 0.5 + 3 and 11 * 4 - 0.5 + 4
    assert network(torch.tensor([[3.0, 4.0]])).tolist() == [[36.5, 47.5]]


def test_masks_are_those_by_which_the_layers_pass() -> None:
    torch.manual_seed(0)
    for form in (CrossNetwork, VectorCrossNetwork):
        network, c0 = form(5, layers=2, gate=GateSpec(name="sigmoid")), torch.randn(4, 5)
        first, second = network.masks(c0)
        c1 = network.layer(0, c0, c0)
        torch.testing.assert_close(first, torch.sigmoid(c0 @ network.gates[0].linear.weight.T))
        torch.testing.assert_close(second, torch.sigmoid(c1 @ network.gates[1].linear.weight.T))
        torch.testing.assert_close(c1, c0 * network.crossed(0, c0) * first + c0)


def test_masks_of_no_gate_are_ones() -> None:
    (mask,) = CrossNetwork(5, layers=1, gate=GateSpec(name="none")).masks(torch.randn(4, 5))
    assert torch.equal(mask, torch.ones(4, 5))


def test_each_gate_learns_which_layer_is_its_own() -> None:
    network = CrossNetwork(5, layers=3, gate=GateSpec(name="sigmoid"))
    assert [gate.shape.depth for gate in network.gates] == [0, 1, 2]
