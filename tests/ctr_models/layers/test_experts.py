from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ctr_models.layers import MLP, MLPConfig
from ctr_models.layers.experts import Experts, ParallelLinear, mix


def make(*, outputs: int | None = None, **config: object) -> Experts:
    torch.manual_seed(0)
    return Experts(6, MLPConfig(**{"hidden": (5, 4), **config}), experts=3, outputs=outputs)  # type: ignore[arg-type]


@pytest.mark.parametrize("activation", ["relu", "dice", "tanh"])
@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("outputs", [None, 2])
def test_each_expert_is_a_perceptron_of_its_own(activation: str, batch_norm: bool, outputs: int | None) -> None:
    """Expert k of the joint layers and an MLP with its weights agree in training, statistics included."""
    experts, x = make(activation=activation, batch_norm=batch_norm, outputs=outputs), torch.randn(9, 6)
    config = MLPConfig(hidden=(5, 4), activation=activation, batch_norm=batch_norm)  # type: ignore[arg-type]
    found = experts.each(x)
    joint = [m for m in experts.layers if not isinstance(m, nn.Flatten | nn.Unflatten)]
    for k in range(3):
        alone = MLP(6, config, outputs=outputs)
        for own, theirs in zip(alone, joint, strict=True):
            if isinstance(theirs, ParallelLinear):
                own.load_state_dict({"weight": theirs.weight[k].T, "bias": theirs.bias[k]})
        torch.testing.assert_close(found[:, k], alone(x))


def test_the_mixture_is_the_weighted_sum() -> None:
    experts, x, weights = make(), torch.randn(7, 6), torch.rand(7, 3)
    outputs = experts.each(x)
    expected = sum(weights[:, k : k + 1] * outputs[:, k] for k in range(3))
    torch.testing.assert_close(experts(x, weights), expected)


def test_an_expert_without_weight_learns_nothing() -> None:
    experts, weights = make(), torch.tensor([[0.5, 0.0, 0.5]]).expand(7, 3)
    experts(torch.randn(7, 6), weights).sum().backward()
    for name, parameter in experts.named_parameters():
        assert parameter.grad is not None
        assert not parameter.grad[1].any(), name
        assert parameter.grad[0].any(), name


def test_experts_differ_and_start_as_perceptrons_do() -> None:
    torch.manual_seed(0)
    layer = ParallelLinear(300, 500, experts=3)
    assert layer.weight.std(dim=(1, 2)).tolist() == pytest.approx([(2 / 800) ** 0.5] * 3, rel=0.02)
    assert not torch.equal(layer.weight[0], layer.weight[1])
    assert not layer.bias.any()


def test_gradients() -> None:
    experts = make(activation="gelu", outputs=1).double()
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(experts, (x, weights))


def test_dropout_drops_in_training_alone() -> None:
    experts, x, weights = make(dropout=0.5), torch.randn(8, 6), torch.ones(8, 3)
    assert not torch.equal(experts(x, weights), experts(x, weights))
    experts.eval()
    assert torch.equal(experts(x, weights), experts(x, weights))


def test_mixed_precision() -> None:
    experts, x, weights = make(), torch.randn(8, 6), torch.rand(8, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = experts(x, weights)
    torch.testing.assert_close(rough.float(), experts(x, weights), rtol=0.05, atol=0.05)


def test_exported_it_takes_any_number_of_rows() -> None:
    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = make(outputs=2)

        def forward(self, x: Tensor, weights: Tensor) -> Tensor:
            return self.experts(x, weights)

    model, rows = Mixture().eval(), torch.export.Dim("rows", min=1, max=1 << 20)
    program = torch.export.export(
        model, (torch.randn(4, 6), torch.rand(4, 3)), dynamic_shapes={"x": {0: rows}, "weights": {0: rows}}
    )
    x, weights = torch.randn(11, 6), torch.rand(11, 3)
    torch.testing.assert_close(program.module()(x, weights), model(x, weights))


def test_mixing_is_exact_for_one_expert() -> None:
    outputs = torch.randn(4, 3, 5)
    chosen = torch.tensor([2, 0, 1, 2])
    assert torch.equal(mix(outputs, torch.eye(3)[chosen]), outputs[torch.arange(4), chosen])
