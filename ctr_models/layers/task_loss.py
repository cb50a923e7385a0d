"""The loss of further tasks, whose labels are not known of every row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class TaskLoss(nn.Module):
    """sum_t w_t * (the mean cross-entropy of task t over the rows whose label is known).

    A row whose label is not known counts neither above nor below the line: it moves no weight. A task of which
    no row of the batch is known adds 0.

    Args:
        weights: w_t, one a task.

    Example:
        >>> loss = TaskLoss([0.5])
        >>> loss(torch.zeros(3, 1), torch.tensor([[1.0], [float("nan")], [0.0]]))  # 0.5 * log 2
        tensor(0.3466)
    """

    weights: Tensor

    def __init__(self, weights: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("weights", torch.tensor(weights, dtype=torch.float32), persistent=False)

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the loss, a scalar.

        Args:
            logits: (B, T).
            targets: 0 or 1, NaN where unknown, (B, T).
        """
        known = ~targets.isnan()
        # An unknown label is replaced before the loss: masked behind it, its NaN would still reach the gradient.
        each = F.binary_cross_entropy_with_logits(
            logits.float(), targets.nan_to_num(0.0), weight=known.float(), reduction="none"
        )
        return (self.weights * each.sum(0) / self.rows(known).clamp_min(1e-9)).sum()

    def rows(self, known: Tensor) -> Tensor:
        """Return how many rows are known of each task, (T,), from which they are, (B, T) bool."""
        return known.sum(0).float()
