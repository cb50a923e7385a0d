from __future__ import annotations

import itertools

import torch

from ctr_models.gates import GateSpec
from ctr_models.layers import CrossNetwork


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
