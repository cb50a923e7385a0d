"""The context-aware feature gate's elementwise part."""

from __future__ import annotations

import torch
from torch import Tensor


def feature_gate(x: Tensor, logits: Tensor) -> Tensor:
    """Return 2 sigmoid(logits) * x: logits of zero pass ``x`` unchanged.

    Args:
        x: what is gated, (B, D) or (B, F, D).
        logits: broadcastable to ``x``; (1, D) when one gate serves the whole batch.

    Returns:
        Shape of ``x``.

    Example:
        >>> feature_gate(torch.tensor([[1.0, -2.0]]), torch.zeros(1, 2))
        tensor([[ 1., -2.]])

    Source: FinalMLP, arXiv 2304.00902.
    """
    return reference(x, logits)


def reference(x: Tensor, logits: Tensor) -> Tensor:
    """The definition, in plain torch."""
    # Doubled on the logits' side, which may have one row where x has B.
    return x * (2 * torch.sigmoid(logits))
