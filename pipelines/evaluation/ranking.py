"""Full ranking: the place of the item that came next among all items that a user hasn't seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

CUTS = (5, 10, 20)
"""List lengths k of HR@k and NDCG@k."""


@dataclass(frozen=True)
class Rankings:
    """Where the items that came next stand, row by row.

    Args:
        rank: 1 is the top, (N,) int64.
        user: stable hash of the user, (N,) int64.
        row: number of the row in the raw data, (N,) int64.
    """

    rank: np.ndarray
    user: np.ndarray
    row: np.ndarray

    def __len__(self) -> int:
        return len(self.rank)

    def metrics(self) -> dict[str, float]:
        """Return ``hr_5`` to ``ndcg_20``."""
        return ranking_metrics(self.rank)

    def columns(self) -> dict[str, np.ndarray]:
        """Return what identifies and describes each row."""
        return {"row": self.row, "user": self.user, "rank": self.rank}


def target_ranks(scores: Tensor, target: Tensor, seen: Tensor, rows: Tensor) -> Tensor:
    """Return the rank of each row's target among the items that its user hasn't seen.

    The target is ranked even if it was seen before. An equal score counts as a better one, so that a model that
    tells nothing apart gets nothing for it; so does NaN. A target that is no item of the catalogue comes last.

    Args:
        scores: of all items, (B, N); overwritten.
        target: (B,) integers; negative if it is none of the N.
        seen: items that are left out, (S,) integers in [0, N).
        rows: the row that has seen each of them, (S,).

    Returns:
        (B,) int64, from 1 to N, or N + 1 for an unknown target.

    Example:
        >>> scores = torch.tensor([[0.9, 0.8, 0.1, 0.7]])
        >>> none = torch.zeros(0, dtype=torch.long)
        >>> target_ranks(scores.clone(), torch.tensor([3]), none, none)
        tensor([3])
        >>> target_ranks(scores, torch.tensor([3]), torch.tensor([0]), torch.tensor([0]))
        tensor([2])
    """
    known = target >= 0
    at = target.clamp_min(0).long().unsqueeze(1)
    own = scores.gather(1, at)  # (B, 1)
    worse = scores < own
    worse[rows, seen] = True
    worse.scatter_(1, at, False)
    return torch.where(known, (~worse).sum(1), scores.shape[1] + 1)


def ranking_metrics(rank: npt.ArrayLike, cuts: Sequence[int] = CUTS) -> dict[str, float]:
    """Return the means of :func:`ranking_values`.

    Args:
        rank: of the one relevant item of each row, (N,), 1 is the top.
        cuts: list lengths.

    Example:
        >>> ranking_metrics([1, 3, 100], cuts=(5,))
        {'hr_5': 0.6666666666666666, 'ndcg_5': 0.5}
    """
    return {name: float(values.mean()) for name, values in ranking_values(rank, cuts).items()}


def ranking_values(rank: npt.ArrayLike, cuts: Sequence[int] = CUTS) -> dict[str, npt.NDArray[np.float64]]:
    """Return each row's hit, HR@k = [rank <= k], and gain, NDCG@k = [rank <= k] / log2(1 + rank), (N,).

    With one relevant item a row the ideal list has gain 1, and recall@k is HR@k.
    """
    rank = np.asarray(rank, dtype=np.float64)
    gain = 1 / np.log2(1 + rank)
    found: dict[str, npt.NDArray[np.float64]] = {f"hr_{k}": (rank <= k).astype(np.float64) for k in cuts}
    return {**found, **{f"ndcg_{k}": np.where(rank <= k, gain, 0.0) for k in cuts}}
