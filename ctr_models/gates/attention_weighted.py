"""AW-MoE's gate: the behaviours of the history vote for experts."""

from __future__ import annotations

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from ctr_models.gates.base import Gate, GateConfig, GateShape, register_gate
from ctr_models.layers.mlp import ACTIVATIONS, Activation, linear


class AttentionWeightedConfig(GateConfig):
    """Settings of gate ``attention_weighted``."""

    hidden: PositiveInt = 32
    """Hidden units of gate unit and activation unit, each."""
    activation: Activation = "relu"


@register_gate("attention_weighted")
class AttentionWeightedGate(Gate):
    """weights = b + sum_j a(h_j, q) z(h_j, q) over the behaviours h_j of the history, q the candidate.

    The activation unit a gives a number, how much h_j counts; the gate unit z gives K, one an expert. Each is a
    perceptron over [h, q, h * q] with one hidden layer; the two first layers are one product, and its share of q
    is computed once a row. The sum is over jagged behaviours without padding, neither normalised nor bounded, so
    weights need not be positive nor add up to 1. A row without history, or a model without, falls back to
    weights = W x + c. Both b and c begin at 1 / K: experts would learn nothing while the votes of small embeddings
    are next to nothing. ``start: identity`` begins with exactly 1 / K for every expert, as gate ``none``.

    The paper's abstract alone is public: units and their form are our reading of it.

    Args:
        config: see :class:`AttentionWeightedConfig`.
        shape: ``choices`` is K; ``context`` the width d of behaviours and candidate, 0 without histories.

    Example:
        >>> from ctr_models.gates import GateShape, GateSpec
        >>> shape = GateShape(slot="expert", width=3, context=4, choices=2)
        >>> gate = GateSpec(name="attention_weighted").build(shape)
        >>> offsets = torch.tensor([0, 2, 2, 3])  # histories of two, no and one behaviour
        >>> weights = gate.mixture(torch.randn(3, 3), torch.randn(3, 4), offsets, torch.randn(3, 4))
        >>> weights.shape
        torch.Size([3, 2])

    Source: AW-MoE, arXiv 2306.05011.
    """

    slots = frozenset({"expert"})
    Config = AttentionWeightedConfig
    config: AttentionWeightedConfig
    source = "arXiv 2306.05011"
    simplex = False

    def __init__(self, config: AttentionWeightedConfig, shape: GateShape) -> None:
        super().__init__(config, shape)
        even = 1 / shape.choices
        self.fallback = linear(shape.width, shape.choices)
        nn.init.constant_(self.fallback.bias, even)
        if config.start == "identity":
            nn.init.zeros_(self.fallback.weight)
        if not shape.context:
            return
        self.of_query = linear(shape.context, 2 * config.hidden)
        self.of_behaviour = linear(shape.context, 2 * config.hidden, bias=False)
        self.of_both = linear(shape.context, 2 * config.hidden, bias=False)
        self.activation = ACTIVATIONS[config.activation]()
        self.activation_unit = linear(config.hidden, 1)
        self.gate_unit = linear(config.hidden, shape.choices)
        self.bias = nn.Parameter(torch.full((shape.choices,), even))
        if config.start == "identity":
            nn.init.zeros_(self.gate_unit.weight)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return the weights of rows without history, (B, K)."""
        return self.fallback(x)

    def mixture(self, x: Tensor, values: Tensor, offsets: Tensor, query: Tensor) -> Tensor:
        """Return the weights, (B, K), from the histories where there are any."""
        alone = self(x)
        if not self.shape.context:
            return alone
        lengths = offsets.diff()
        rows = torch.repeat_interleave(lengths, output_size=values.shape[0])
        votes = self._votes(values, rows, query)
        votes = votes.to(torch.promote_types(votes.dtype, torch.float32))  # long sums lose bits in bfloat16
        sums = votes.new_zeros(alone.shape).index_add(0, rows, votes)
        return torch.where((lengths > 0).unsqueeze(1), (sums + self.bias).to(alone.dtype), alone)

    def attention(self, values: Tensor, offsets: Tensor, query: Tensor) -> Tensor:
        """Return how far each behaviour moves the weights, |a_j z_j|, (T,)."""
        rows = torch.repeat_interleave(offsets.diff(), output_size=values.shape[0])
        return self._votes(values, rows, query).norm(dim=1)

    def _votes(self, values: Tensor, rows: Tensor, query: Tensor) -> Tensor:
        met = self.of_behaviour(values) + self.of_both(values * query[rows]) + self.of_query(query)[rows]
        of_a, of_z = self.activation(met).chunk(2, dim=1)  # (T, hidden) each
        return self.activation_unit(of_a) * self.gate_unit(of_z)  # (T, K)
