"""What gates over the values of features share."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ctr_models.gates.base import Gate


class SelectionGate(Gate):
    """Decides for every value of every feature, by one logit a value, whether its vector is kept.

    The logits live in tables of dimension 1 beside the embeddings, not in the gate: a model starts them at
    ``initial_logit`` and gives the gate those of a batch as context, (B, F). A search trains them under
    :meth:`value_penalty`; :meth:`harden` ends it. From then on the mask depends on the logits alone, is 0 for the
    values that :meth:`kept` leaves out, and for the others can be folded into their vectors.

    A subclass writes :meth:`mask` and :meth:`kept`.
    """

    slots = frozenset({"selection"})
    initial_logit: ClassVar[float] = 0.0
    """What the logit of every value starts with."""
    hardened: Tensor

    def mask(self, logits: Tensor) -> Tensor:
        """Return the mask of values with these logits, of their shape."""
        raise NotImplementedError

    def kept(self, logits: Tensor) -> Tensor:
        """Return which values with these logits are kept when the search ends, bool, of their shape."""
        raise NotImplementedError

    def value_penalty(self, logits: Tensor) -> Tensor:
        """Return what values with these logits add to the loss, a scalar: called with whole tables, not a batch."""
        return logits.new_zeros(())

    def harden(self) -> None:
        """End the search: what is not kept gets mask 0."""
        self.hardened.fill_(True)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return the mask, (B, F, 1), of values with the logits ``context``, (B, F)."""
        if context is None:
            raise ValueError("slot selection needs the logits of the values as context")
        return self.mask(context).unsqueeze(2)

    @torch.no_grad()
    def telemetry(self, mask: Tensor) -> dict[str, float]:
        """Describe a mask; ``zeros`` is the share of values that get nothing."""
        return {**super().telemetry(mask), "zeros": float((mask == 0).float().mean())}
