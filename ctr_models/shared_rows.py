"""The rows of candidates, with what a user shares with all of its candidates standing there once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TypeAlias

import torch
from torch import Tensor, nn

from ctr_models.jagged import rows_of
from kernels import shared_linear


@dataclass(frozen=True)
class Run:
    """Columns side by side that are all the user's or all the candidate's.

    Args:
        shared: whether they are the user's.
        place: where they stand in a row.
        within: where they stand among the columns of their kind.
    """

    shared: bool
    place: slice
    within: slice


@dataclass(frozen=True)
class Columns:
    """Which columns of a row are the user's and which the candidate's.

    Args:
        names: the fields, in the order in which they stand in a row.
        dims: their dimensions.
        shared: the fields that a user shares with its candidates.

    Example:
        >>> columns = Columns(("age", "hour", "price"), (2, 3, 1), frozenset({"age", "hour"}))
        >>> [(run.shared, run.place.start, run.place.stop) for run in columns.runs]
        [(True, 0, 5), (False, 5, 6)]
    """

    names: tuple[str, ...]
    dims: tuple[int, ...]
    shared: frozenset[str]

    @property
    def width(self) -> int:
        """Length of a row."""
        return sum(self.dims)

    @cached_property
    def fields(self) -> dict[str, Run]:
        """Each field as a run of its own."""
        found, start, taken = {}, 0, {True: 0, False: 0}
        for name, dim in zip(self.names, self.dims, strict=True):
            kind = name in self.shared
            found[name] = Run(kind, slice(start, start + dim), slice(taken[kind], taken[kind] + dim))
            start, taken[kind] = start + dim, taken[kind] + dim
        return found

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        """The columns in as few runs as can be, in their order."""
        found: list[Run] = []
        for run in self.fields.values():
            if found and found[-1].shared == run.shared:
                last = found.pop()
                place, within = slice(last.place.start, run.place.stop), slice(last.within.start, run.within.stop)
                run = Run(run.shared, place, within)
            found.append(run)
        return tuple(found)

    def merge(self, shared: Tensor, own: Tensor) -> Tensor:
        """Return rows of both kinds of columns, each in its place."""
        parts = [_columns(shared if run.shared else own, run.within) for run in self.runs]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def cut(self, rows: Tensor, *, shared: bool) -> Tensor:
        """Return the columns of one kind."""
        parts = [_columns(rows, run.place) for run in self.runs if run.shared == shared]
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts, dim=1) if parts else rows[:, :0]


columns_of = lru_cache(maxsize=256)(Columns)
"""The Columns of these arguments, made once: every request of a client has the same."""


@dataclass(frozen=True, eq=False)
class SharedRows:
    """N rows (N, D) for the candidates of U users, of which some columns are alike for all candidates of a user.

    Args:
        shared: those columns, once a user, (U, C).
        own: the others, (N, D - C).
        offsets: where each user's candidates begin, and N at the end, (U + 1,).
        columns: where both belong.

    Example:
        >>> columns = Columns(("user", "item"), (1, 1), frozenset({"user"}))
        >>> users, items = torch.tensor([[1.0], [2.0]]), torch.tensor([[7.0], [8.0], [9.0]])
        >>> SharedRows(users, items, torch.tensor([0, 2, 3]), columns).joined()
        tensor([[1., 7.],
                [1., 8.],
                [2., 9.]])
    """

    shared: Tensor
    own: Tensor
    offsets: Tensor
    columns: Columns

    def __len__(self) -> int:
        return self.own.shape[0]

    @cached_property
    def user(self) -> Tensor:
        """The user of each row, (N,)."""
        return rows_of(self.offsets, self.own.shape[0])

    def spread(self, of_users: Tensor) -> Tensor:
        """Give each row what its user has: (U, ...) to (N, ...); of a single one, a view."""
        if of_users.shape[0] == 1:
            return of_users.expand(self.own.shape[0], *of_users.shape[1:])
        return of_users.index_select(0, self.user)

    def joined(self) -> Tensor:
        """Return the plain rows, (N, D)."""
        return self.columns.merge(self.spread(self.shared), self.own)

    def users(self) -> Tensor:
        """Return the users as rows of their own, with zeros in the candidates' columns, (U, D)."""
        users = self.shared.shape[0]
        return self.columns.merge(self.shared, self.own.new_zeros(1, self.own.shape[1]).expand(users, -1))

    def field(self, name: str) -> Tensor:
        """Return one field of the plain rows, (N, d)."""
        run = self.columns.fields[name]
        return self.spread(_columns(self.shared, run.within)) if run.shared else _columns(self.own, run.within)

    def pick(self, names: tuple[str, ...]) -> SharedRows:
        """Return rows of some fields alone, in the order of the names."""
        runs = [self.columns.fields[name] for name in names]
        dims = tuple(run.place.stop - run.place.start for run in runs)
        shared = [self.shared[:, :0], *(_columns(self.shared, run.within) for run in runs if run.shared)]
        own = [self.own[:, :0], *(_columns(self.own, run.within) for run in runs if not run.shared)]
        columns = columns_of(names, dims, self.columns.shared)
        return SharedRows(torch.cat(shared, dim=1), torch.cat(own, dim=1), self.offsets, columns)

    def replaced(self, fields: Mapping[str, Tensor]) -> SharedRows:
        """Return rows with other values in some fields, (N, d) each, which are then the candidates' own."""
        old = self.columns
        columns = columns_of(old.names, old.dims, old.shared.difference(fields))
        kept = [_columns(self.shared, run.within) for name, run in old.fields.items() if name in columns.shared]
        own = [fields[n] if n in fields else self.field(n) for n in old.names if n not in columns.shared]
        shared = torch.cat([self.shared[:, :0], *kept], dim=1)
        return SharedRows(shared, torch.cat(own, dim=1), self.offsets, columns)

    def masked(self, mask: Tensor) -> SharedRows:
        """Return the rows times a mask that each user has for all of its candidates, (U or 1, D or 1)."""
        if mask.shape[1] == 1:
            return SharedRows(self.shared * mask, self.own * self.spread(mask), self.offsets, self.columns)
        of_shared, of_own = self.columns.cut(mask, shared=True), self.columns.cut(mask, shared=False)
        return SharedRows(self.shared * of_shared, self.own * self.spread(of_own), self.offsets, self.columns)

    def linear(self, layer: nn.Linear, *, fused: bool = True) -> Tensor:
        """Return W x + b of each row x, (N, H); what W makes of the user is computed once a user."""
        # Users go with all of W: a row of zeros costs less than to cut their columns out. The candidates' columns
        # are cut out in every call, so that they are never out of date: about a hundredth of their product.
        of_own = self.columns.cut(layer.weight, shared=False)
        if torch.jit.is_tracing():  # a program cuts once
            users, of_users = self.shared, self.columns.cut(layer.weight, shared=True)
        else:
            users, of_users = self.users(), layer.weight
        return shared_linear(users, self.own, self.offsets, of_users, of_own, layer.bias, fused=fused)


def _columns(rows: Tensor, place: slice) -> Tensor:
    """Return columns side by side; all of them as they are. One operator, where ``rows[:, place]`` is two."""
    width = place.stop - place.start
    return rows if width == rows.shape[1] else rows.narrow(1, place.start, width)


Rows: TypeAlias = Tensor | SharedRows
"""What a layer takes that can tell both apart."""


def joined(rows: Rows) -> Tensor:
    """Return plain rows, (N, D)."""
    return rows.joined() if isinstance(rows, SharedRows) else rows


def summed(part: Callable[[Tensor], Tensor], rows: Rows) -> Tensor:
    """Return what ``part`` makes of each row, (N, ...), where that is a sum over columns or fields.

    Example:
        >>> summed(lambda x: x.sum(1), torch.tensor([[1.0, 2.0]]))
        tensor([3.])
    """
    if isinstance(rows, SharedRows):
        return part(rows.own) + rows.spread(part(rows.shared))
    return part(rows)
