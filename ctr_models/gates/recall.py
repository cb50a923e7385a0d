"""Multi-query associative recall: does a gate of slot ``sequence`` find by content what a history held?"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ctr_models.gates.base import Gate

KEYS, VALUES, PAIRS = 10, 5, 5


class Recall(nn.Module):
    """A history of (key, value) pairs is asked for the value of each of its keys.

    A behaviour carries a key and a value side by side, a query carries a key. The scores that a model's own
    attention would give are all 1: what is found is found by the gate.

    Difference from the paper: keys and values are not tokens one after the other, as a history of items has
    their attributes at hand.

    Args:
        gate: of slot ``sequence``, its width even.

    Example:
        >>> from ctr_models.gates import GateShape, GateSpec
        >>> task = Recall(GateSpec(name="none").build(GateShape(slot="sequence", width=8)))
        >>> task(*pairs(3)).shape
        torch.Size([3, 5, 5])

    Source: Zoology, arXiv 2312.04927.
    """

    def __init__(self, gate: Gate) -> None:
        super().__init__()
        self.keys = nn.Embedding(KEYS, gate.shape.width // 2)
        self.values = nn.Embedding(VALUES, gate.shape.width // 2)
        self.gate, self.head = gate, nn.Linear(gate.shape.width, VALUES)

    def forward(self, keys: Tensor, values: Tensor) -> Tensor:
        """Map the pairs of histories, (B, N) each, to logits of the value of each key, (B, N, VALUES)."""
        count = keys.shape[1]
        behaviours = torch.cat([self.keys(keys), self.values(values)], dim=2)  # (B, N, D)
        query = F.pad(self.keys(keys), (0, behaviours.shape[2] // 2)).flatten(0, 1)  # (B N, D)
        each = behaviours.repeat_interleave(count, dim=0).flatten(0, 1)  # a history a query
        offsets = torch.arange(0, len(each) + 1, count)
        pooled = self.gate.pool(each, torch.ones(len(each)), offsets, query)
        return self.head(pooled).unflatten(0, keys.shape)


def pairs(rows: int) -> tuple[Tensor, Tensor]:
    """Return keys, none twice in a history, and their values, (rows, PAIRS) each."""
    keys = torch.rand(rows, KEYS).argsort(1)[:, :PAIRS]
    return keys, torch.randint(VALUES, keys.shape)


def recall_of(gate: Gate, *, steps: int = 300) -> float:
    """Train a gate on recall for a few seconds.

    Args:
        gate: of slot ``sequence``; trained in place. Some 32 wide, it has room for the keys.
        steps: batches of 64 histories.

    Returns:
        The share of right answers on new histories. Without a look at the query, about 0.47.
    """
    task = Recall(gate)
    optimizer = torch.optim.Adam(task.parameters(), lr=0.02)
    for _ in range(steps):
        keys, values = pairs(64)
        optimizer.zero_grad()
        F.cross_entropy(task(keys, values).flatten(0, 1), values.flatten()).backward()
        optimizer.step()
    with torch.no_grad():
        keys, values = pairs(256)
        return float((task(keys, values).argmax(2) == values).float().mean())
