"""OptFS's gate over the values of features."""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor

from ctr_models.gates.base import GateConfig, GateShape, register_gate
from ctr_models.gates.selection import SelectionGate


class AnnealedConfig(GateConfig):
    """Settings of gate ``annealed``. Either start is the identity."""

    initial: float = 0.5
    """s_0, the logit of every value at the start."""
    sharpness: float = Field(1000.0, ge=1)
    """t at the end of the search. It starts at 1; the paper's range is 100 to 10,000."""
    penalty: float = Field(2e-9, ge=0)
    """Price of a fully open value, paid for every value of every table: the more there are, the less it must be."""


@register_gate("annealed")
class AnnealedGate(SelectionGate):
    """mask_v = sigmoid(t s_v) / sigmoid(s_0) for a value v of logit s_v; hardened, 1[s_v > 0] / sigmoid(s_0).

    t = sharpness^done grows exponentially over the search, so that masks that start at exactly 1 end at 0 or
    1 / sigmoid(s_0). The penalty is ``penalty`` times the sum of sigmoid(t s_v) over all values: a price on what
    is open that tends to the number of values kept.

    Difference from the official code: t grows with every step, not with every epoch.

    Args:
        config: see :class:`AnnealedConfig`.
        shape: of slot ``selection``.

    Example:
        >>> from ctr_models.gates import GateShape, GateSpec
        >>> gate = GateSpec(name="annealed").build(GateShape(slot="selection", width=4, fields=3))
        >>> gate(torch.ones(1, 3, 4), torch.tensor([[0.5, 0.1, -0.1]])).flatten()
        tensor([1.0000, 0.8434, 0.7631])
        >>> gate.harden()
        >>> gate(torch.ones(1, 3, 4), torch.tensor([[0.5, 0.1, -0.1]])).flatten()
        tensor([1.6065, 1.6065, 0.0000])

    Source: OptFS, arXiv 2301.10909.
    """

    Config = AnnealedConfig
    config: AnnealedConfig
    source = "arXiv 2301.10909"
    sharpness: Tensor

    def __init__(self, config: AnnealedConfig, shape: GateShape) -> None:
        super().__init__(config, shape)
        self.register_buffer("sharpness", torch.tensor(1.0))
        self.register_buffer("hardened", torch.tensor(False))
        self.initial_logit = config.initial  # type: ignore[misc]
        self.bound = 1 + math.exp(-config.initial)  # type: ignore[misc]

    def mask(self, logits: Tensor) -> Tensor:
        """Return the mask of values with these logits, of their shape."""
        hard = self.kept(logits).to(logits.dtype)
        return torch.where(self.hardened, hard, torch.sigmoid(self.sharpness * logits)) * self.bound

    def kept(self, logits: Tensor) -> Tensor:
        """Return which values are kept: those of a logit above 0."""
        return logits > 0

    @torch.no_grad()
    def anneal(self, done: float) -> None:
        """Sharpen the masks."""
        self.sharpness.fill_(self.config.sharpness**done)

    def value_penalty(self, logits: Tensor) -> Tensor:
        """Return the price of values with these logits, a scalar; 0 once hardened."""
        price = self.config.penalty * torch.sigmoid(self.sharpness * logits).sum()
        return torch.where(self.hardened, torch.zeros_like(price), price)
