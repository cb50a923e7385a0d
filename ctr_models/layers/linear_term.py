"""The first-order term: one weight a feature value."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ctr_models.batch import Batch
from ctr_models.candidates import Candidates
from ctr_models.embeddings import FeatureEmbedding
from ctr_models.schema import Schema
from ctr_models.shared_rows import summed


class LinearTerm(nn.Module):
    """bias + the sum of one weight for each id (times the number, for a numeric field).

    fbgemm's tables are a multiple of 4 wide, so a weight is the first coordinate of a vector of 4; the other
    three take no part and get no gradient. That is exactly a table of width 1 under SGD, Adam and Adagrad. Row-wise
    Adagrad averages the squared gradient over the 4, so its steps here are twice as long.

    Args:
        schema: what the batch holds; its dimensions don't matter.
        std: standard deviation of the initial weights.
        prefix: put before table names.

    Example:
        >>> from ctr_models import Schema, example_batch
        >>> schema = Schema.of({"user": 10}, dense=["price"])
        >>> LinearTerm(schema, std=0.1)(example_batch(schema, rows=3)).shape
        torch.Size([3])
    """

    WIDTH = 4

    def __init__(self, schema: Schema, *, std: float, prefix: str = "linear_") -> None:
        super().__init__()
        self.embedding = FeatureEmbedding(schema.with_dim(self.WIDTH), std=std, prefix=prefix)
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, batch: Batch | Candidates) -> Tensor:
        """Return (B,)."""
        return summed(lambda x: x[:, :: self.WIDTH].sum(1), self.embedding(batch).flat) + self.bias
