"""The gate that draws: choices are sampled in training, ever more decidedly."""

from __future__ import annotations

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ctr_models.gates.base import GateConfig, GateShape, register_gate
from ctr_models.gates.selection import SelectionGate
from ctr_models.gates.softmax import require_plain_logits
from ctr_models.layers.mlp import linear


class GumbelConfig(GateConfig):
    """Settings of gate ``gumbel``."""

    temperature: float = Field(1.0, gt=0)
    """At the start of training."""
    final_temperature: float = Field(0.1, gt=0)
    """At its end."""
    hard: bool = False
    """Whether the likeliest choice takes all, its gradient being that of the soft weights."""
    penalty: float = Field(0.0, ge=0)
    """Slots ``selection`` and ``field``: price of a value, or a field, that is kept for certain."""

    @model_validator(mode="after")
    def _can_start_so(self) -> GumbelConfig:
        if self.hard and self.start == "identity":
            raise ValueError("a hard choice is all or nothing and can't start as the identity; drop one")
        return self


@register_gate("gumbel")
class GumbelGate(SelectionGate):
    """weights = softmax((l + g) / temperature) with Gumbel noise g in training, softmax(l / temperature) after.

    ===========  ==============================================================================================
    slot         l
    ===========  ==============================================================================================
    expert       W x + b, one logit an expert
    interaction  x, the logits of each pair's treatments
    selection    (s, 0) for a value of logit s, to keep or to leave; the mask is the first weight:
                 sigmoid((s + log u - log(1 - u)) / temperature) with u ~ U(0, 1), sigmoid(s / temperature) after
    field        the same, with one learned logit a field
    ===========  ==============================================================================================

    The temperature falls in a line from ``temperature`` to ``final_temperature`` over the training and is kept
    with the weights, so that evaluation and export see what training reached. :meth:`harden` ends the drawing in
    slots selection and field: 1 for a logit above 0, else 0. There the penalty is ``penalty`` times the sum of
    sigmoid(s). ``start: identity`` is that of evaluation: W starts at zero, which gives 1 / K to every expert, and
    masks are doubled, 2 sigmoid(0) = 1; their range is then [0, 2].

    Args:
        config: see :class:`GumbelConfig`.
        shape: ``choices`` is K; slot ``field`` needs ``fields``.

    Example:
        >>> from ctr_models.gates import GateShape, GateSpec
        >>> gate = GateSpec(name="gumbel").build(GateShape(slot="interaction", width=2, choices=2)).eval()
        >>> gate(torch.tensor([[0.0, 1.0]]))
        tensor([[0.2689, 0.7311]])
        >>> gate.anneal(1.0)
        >>> gate(torch.tensor([[0.0, 1.0]]))
        tensor([[4.5398e-05, 9.9995e-01]])

    Source: arXiv 1611.01144; in OptInter, arXiv 2108.01265, and MaskLLM, arXiv 2409.17481.
    """

    slots = frozenset({"selection", "field", "expert", "interaction"})
    Config = GumbelConfig
    config: GumbelConfig
    source = "arXiv 1611.01144"
    temperature: Tensor

    def __init__(self, config: GumbelConfig, shape: GateShape) -> None:
        super().__init__(config, shape)
        self.register_buffer("temperature", torch.tensor(float(config.temperature)))
        self.linear = linear(shape.width, shape.choices) if shape.slot == "expert" else nn.Identity()
        self.logits = nn.Parameter(torch.zeros(1, shape.fields)) if shape.slot == "field" else None
        if shape.slot == "interaction":
            require_plain_logits(config, config.temperature == 1)
        masks = shape.slot in ("selection", "field")
        if masks:
            self.register_buffer("hardened", torch.tensor(False))
        if config.start == "identity" and shape.slot == "expert":
            nn.init.zeros_(self.linear.weight)
        if config.start == "identity" and masks:
            self.bound = 2.0  # type: ignore[misc]

    @property
    def by_context(self) -> bool:
        """Slot field: True, since each field has its own logit."""
        return self.logits is not None

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return the weights, (B, K); in slots selection and field the mask, (B or 1, F, 1)."""
        if self.shape.slot == "selection":
            return super().forward(x, context)
        if self.logits is not None:
            rows = x.shape[0] if self.training else 1
            return self.mask(self.logits.expand(rows, -1)).unsqueeze(2)
        logits = self.linear(x)
        if self.training:
            drawn = torch.empty_like(logits, dtype=torch.promote_types(logits.dtype, torch.float32)).exponential_()
            logits = logits - drawn.clamp_min(1e-20).log().to(logits.dtype)
        soft = (logits / self.temperature).softmax(-1)
        taken = torch.zeros_like(soft).scatter(-1, soft.argmax(-1, keepdim=True), 1.0)
        return self._taken(soft, taken)

    def mask(self, logits: Tensor) -> Tensor:
        """Return the mask of values with these logits, of their shape: drawn in training."""
        drawn = logits
        if self.training:
            u = torch.rand(logits.shape, device=logits.device).clamp(1e-6, 1 - 1e-6)
            drawn = logits + torch.logit(u).to(logits.dtype)
        soft = torch.sigmoid(drawn / self.temperature)
        mask = self._taken(soft, (soft > 0.5).to(soft.dtype))
        return torch.where(self.hardened, self.kept(logits).to(soft.dtype), mask) * self.bound

    def kept(self, logits: Tensor) -> Tensor:
        """Return which values are kept: those of a logit above 0."""
        return logits > 0

    def value_penalty(self, logits: Tensor) -> Tensor:
        """Return the price of values with these logits, a scalar; 0 once hardened."""
        price = self.config.penalty * torch.sigmoid(logits).sum()
        return torch.where(self.hardened, torch.zeros_like(price), price)

    def penalty(self) -> Tensor:
        """Return the price of the fields in slot field; a selection's values are priced by their tables."""
        return torch.zeros(()) if self.logits is None else self.value_penalty(self.logits)

    @torch.no_grad()
    def anneal(self, done: float) -> None:
        """Lower the temperature."""
        first, last = self.config.temperature, self.config.final_temperature
        self.temperature.fill_(first + (last - first) * done)

    def _taken(self, soft: Tensor, hard: Tensor) -> Tensor:
        """Let the hard choice through, if it is asked for, under the gradient of the soft one."""
        return hard + (soft - soft.detach()) if self.config.hard else soft  # in brackets: 0, so that 1 stays 1
