"""Candidates of a request by column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


class CandidateColumns(Sequence[Mapping[str, Any]]):
    """Candidates by column, as columnar formats bring them: the encoder reads the columns, and no row is made.

    Args:
        size: candidates.
        columns: values by name, one a candidate; None where a candidate gives none.

    Example:
        >>> some = CandidateColumns(2, {"ad": ["a", "b"], "price": [1.5, None]})
        >>> len(some), some[1], list(some)[0]
        (2, {'ad': 'b', 'price': None}, {'ad': 'a', 'price': 1.5})
    """

    def __init__(self, size: int, columns: Mapping[str, list[Any]]) -> None:
        self.size, self.columns = size, columns

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: Any) -> Any:
        """Return a candidate as a row."""
        place = range(self.size)[index]
        return {name: values[place] for name, values in self.columns.items()}
