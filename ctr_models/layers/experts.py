"""K perceptrons of one form, computed together and mixed row by row."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ctr_models.layers.mlp import MLPConfig, layer_activation
from kernels.expert_mixture import expert_layer, expert_mixture


class Experts(nn.Module):
    """y = sum_k w_k MLP_k(x), with weights w that a gate in slot ``expert`` gives each row.

    The experts' layers stand side by side: each is one batched product over all experts, with no loop over them.
    Every expert sees every row; weights of 0 leave an expert out of the sum, not out of the computation. Each
    starts as an :class:`ctr_models.layers.mlp.MLP` of its own would.

    Args:
        inputs: width of the input.
        config: the hidden layers of each expert.
        experts: K.
        outputs: width of a last, plain linear layer; None ends with the last hidden layer.

    Example:
        >>> experts, x = Experts(8, MLPConfig(hidden=(6, 4)), experts=3), torch.randn(2, 8)
        >>> experts.each(x).shape
        torch.Size([2, 3, 4])
        >>> experts(x, torch.full((2, 3), 1 / 3)).shape
        torch.Size([2, 4])
    """

    def __init__(self, inputs: int, config: MLPConfig, *, experts: int, outputs: int | None = None) -> None:
        super().__init__()
        self.experts = experts
        layers: list[nn.Module] = []
        width = inputs
        for size in config.hidden:
            layers.append(ParallelLinear(width, size, experts=experts))
            # A statistic and a parameter for each unit of each expert: to these layers it is one wide perceptron.
            joint: list[nn.Module] = [nn.BatchNorm1d(experts * size)] if config.batch_norm else []
            joint.append(layer_activation(config.activation, experts * size))
            layers += [nn.Flatten(1), *joint, nn.Unflatten(1, (experts, size))]
            if config.dropout:
                layers.append(nn.Dropout(config.dropout))
            width = size
        if outputs is not None:
            layers.append(ParallelLinear(width, outputs, experts=experts))
        self.layers = nn.Sequential(*layers)
        self.width = width if outputs is None else outputs

    def each(self, x: Tensor) -> Tensor:
        """Map (B, inputs) to what each expert makes of it, (B, K, width), to be mixed by several gates."""
        return self.layers(x)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """Map (B, inputs) and weights (B, K) to the mixture, (B, width)."""
        if isinstance(self.layers[-1], ParallelLinear):
            return self.layers[-1].mixed(self.layers[:-1](x), weights)
        return mix(self.each(x), weights)


class ParallelLinear(nn.Module):
    """y_k = x_k W_k + b_k, a Linear for each expert, Xavier-normal and with zero bias at the start.

    Example:
        >>> ParallelLinear(4, 2, experts=3)(torch.randn(5, 3, 4)).shape
        torch.Size([5, 3, 2])
    """

    fused: bool = True
    """Whether fast operators may run; ``model.kernels`` of the model sets it."""

    def __init__(self, inputs: int, outputs: int, *, experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, inputs, outputs) * (2 / (inputs + outputs)) ** 0.5)
        self.bias = nn.Parameter(torch.zeros(experts, outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, K, inputs), or one input for all, (B, inputs), to (B, K, outputs)."""
        everyone = x.new_ones(1, 1).expand(x.shape[0], len(self.weight))
        return expert_layer(x, everyone, self.weight, self.bias, fused=self.fused)

    def mixed(self, x: Tensor, weights: Tensor) -> Tensor:
        """Return what :meth:`forward` would, weighed by (B, K) and summed, (B, outputs)."""
        return expert_mixture(x, weights.to(x.dtype), self.weight, self.bias, fused=self.fused)


def mix(outputs: Tensor, weights: Tensor) -> Tensor:
    """Return the outputs of each row weighed and summed.

    Args:
        outputs: of each expert, (B, K, D).
        weights: (B, K).

    Example:
        >>> mix(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), torch.tensor([[0.5, 0.25]]))
        tensor([[1.2500, 2.0000]])
    """
    return torch.bmm(weights.unsqueeze(1).to(outputs.dtype), outputs).squeeze(1)
