"""The gate that is exactly 0 with some probability, and pays for each that is not."""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor, nn

from ctr_models.gates.base import GateConfig, GateShape, register_gate
from ctr_models.gates.selection import SelectionGate


class HardConcreteConfig(GateConfig):
    """Settings of gate ``hard_concrete``. ``start: identity`` begins with logits at which the mask is just 1."""

    initial: float = 0.0
    """The logit of every gate at the start, with ``start: paper``; 0 is open in about one case of two."""
    temperature: float = Field(2 / 3, gt=0, lt=1)
    """beta: the nearer to 0, the fewer masks between 0 and 1."""
    lower: float = Field(-0.1, lt=0)
    """gamma: what is below 0 after stretching is 0."""
    upper: float = Field(1.1, gt=1)
    """zeta: what is above 1 after stretching is 1."""
    penalty: float = Field(1e-5, ge=0)
    """Price of a gate that is open for certain. In slot selection it is paid for every value of every table."""


@register_gate("hard_concrete")
class HardConcreteGate(SelectionGate):
    """mask = clip(s (zeta - gamma) + gamma, 0, 1), where in training s = sigmoid((log u - log(1 - u) + a) / beta)
    with u ~ U(0, 1), drawn anew for every row, and otherwise s = sigmoid(a).

    The penalty is ``penalty`` times the sum of P(mask > 0) = sigmoid(a - beta log(-gamma / zeta)). In slot
    ``selection`` a is the logit of a value and the sum is over all values; in slot ``field`` each field has one.
    :meth:`harden` ends the drawing.

    Args:
        config: see :class:`HardConcreteConfig`.
        shape: slot ``field`` needs ``fields``.

    Example:
        >>> from ctr_models.gates import GateShape, GateSpec
        >>> gate = GateSpec(name="hard_concrete").build(GateShape(slot="selection", width=4, fields=3)).eval()
        >>> gate(torch.ones(1, 3, 4), torch.tensor([[0.0, 3.0, -3.0]])).flatten()
        tensor([0.5000, 1.0000, 0.0000])

    Source: L0 regularization, arXiv 1712.01312.
    """

    slots = frozenset({"selection", "field"})
    Config = HardConcreteConfig
    config: HardConcreteConfig
    source = "arXiv 1712.01312"

    def __init__(self, config: HardConcreteConfig, shape: GateShape) -> None:
        super().__init__(config, shape)
        lower, upper = config.lower, config.upper
        self.register_buffer("hardened", torch.tensor(False))
        self._open_above = math.log(-lower / upper)
        first = config.initial
        if config.start == "identity":
            first = math.log((1 - lower) / (upper - 1)) + 0.1  # a little above where the mask becomes 1
        self.initial_logit = first  # type: ignore[misc]
        self.logits = nn.Parameter(torch.full((1, shape.fields), first)) if shape.slot == "field" else None

    @property
    def by_context(self) -> bool:
        """Slot field: True, since each field has its own logit."""
        return self.logits is not None

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return the mask, (B, F, 1); in slot field (1, F, 1) where nothing is drawn."""
        if self.logits is None:
            return super().forward(x, context)
        rows = x.shape[0] if self.training else 1
        return self.mask(self.logits.expand(rows, -1)).unsqueeze(2)

    def mask(self, logits: Tensor) -> Tensor:
        """Return the mask of gates with these logits, of their shape: drawn in training."""
        plain = self._stretched(torch.sigmoid(logits))
        if not self.training:
            return plain
        u = torch.rand(logits.shape, device=logits.device).clamp(1e-6, 1 - 1e-6)
        noisy = (torch.logit(u) + logits) / self.config.temperature
        return torch.where(self.hardened, plain, self._stretched(torch.sigmoid(noisy)).to(logits.dtype))

    def kept(self, logits: Tensor) -> Tensor:
        """Return which gates have a mask above 0 outside training."""
        return logits > self._open_above

    def value_penalty(self, logits: Tensor) -> Tensor:
        """Return the price of gates with these logits, a scalar; 0 once hardened."""
        is_open = torch.sigmoid(logits - self.config.temperature * self._open_above)
        price = self.config.penalty * is_open.sum()
        return torch.where(self.hardened, torch.zeros_like(price), price)

    def penalty(self) -> Tensor:
        """Return the price of the fields in slot field; a selection's values are priced by their tables."""
        return torch.zeros(()) if self.logits is None else self.value_penalty(self.logits)

    def _stretched(self, s: Tensor) -> Tensor:
        return (s * (self.config.upper - self.config.lower) + self.config.lower).clamp(0, 1)
