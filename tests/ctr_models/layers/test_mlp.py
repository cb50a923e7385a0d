from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from ctr_models.layers import MLP, MLPConfig
from ctr_models.layers.mlp import ACTIVATIONS


def test_layers_stand_in_the_published_order() -> None:
    mlp = MLP(8, MLPConfig(hidden=(6, 4), dropout=0.1, batch_norm=True), outputs=1)
    block = [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Dropout]
    assert [type(layer) for layer in mlp] == [*block, *block, nn.Linear]
    assert mlp.width == 1
    assert MLP(8, MLPConfig(hidden=(6, 4))).width == 4


def test_weights_are_xavier_normal_and_biases_zero() -> None:
    torch.manual_seed(0)
    first = MLP(300, MLPConfig(hidden=(500,)))[0]
    assert isinstance(first, nn.Linear)
    assert first.weight.std().item() == pytest.approx((2 / 800) ** 0.5, rel=0.02)
    assert not first.bias.any()


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("batch_norm", [False, True])
def test_gradients(activation: str, batch_norm: bool) -> None:
    torch.manual_seed(0)
    config = MLPConfig(hidden=(5, 3), activation=activation, batch_norm=batch_norm)  # type: ignore[arg-type]
    mlp, x = MLP(4, config, outputs=2).double(), torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(mlp, (x,))


def test_the_input_is_left_alone() -> None:
    x = torch.randn(3, 4)
    before = x.clone()
    MLP(4, MLPConfig(hidden=(5,)))(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    "wrong", [{"hidden": []}, {"dropout": 1.0}, {"activation": "rely"}, {"hiden": [4]}, {"hidden": [0]}]
)
def test_wrong_settings_are_refused(wrong: dict) -> None:
    with pytest.raises(ValidationError):
        MLPConfig(**wrong)
