"""Scoring requests as a model sees them: what a user shares with all of its candidates, and what each has alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from ctr_models.batch import Batch, EncodedRows, Ragged
from ctr_models.jagged import rows_of
from ctr_models.schema import IdField, Schema

Forward = TypeVar("Forward", bound=Callable[..., Tensor])


@dataclass(frozen=True, eq=False)
class Candidates:
    """N candidates of U users, to be scored by :meth:`ctr_models.CTRModel.scores`.

    Each field stands in one of two batches: once a user, or once a candidate. Which, is said by whoever makes them;
    in a request it is what no candidate gives for itself, mostly the fields of role ``user`` and ``context``.

    Args:
        shared: the users, U rows of the fields that they share with their candidates.
        own: the candidates, N rows of all other fields, one user's after the other.
        offsets: where each user's candidates begin, and N at the end, (U + 1,) int64.
        names: the fields of ``shared``.

    Example:
        >>> from ctr_models import create_model, example_rows
        >>> schema = Schema.of({"user": 10, "item": 20})
        >>> user = example_rows(schema.only(["user"]), rows=1)
        >>> items = example_rows(schema.only(["item"]), rows=500)
        >>> create_model("dnn", schema).eval().scores(Candidates.of(user, items)).shape
        torch.Size([500])
    """

    shared: Batch
    own: Batch
    offsets: Tensor
    names: frozenset[str]

    @classmethod
    def of(cls, shared: EncodedRows, own: EncodedRows, counts: Sequence[int] | None = None) -> Candidates:
        """Make them of encoded rows.

        Args:
            shared: the users, of a schema of some fields.
            own: the candidates, of a schema of the others.
            counts: candidates of each user, (U,); None gives all to a single user.

        Raises:
            ValueError: the counts do not fit the rows.
        """
        counts = [len(own)] if counts is None else counts
        if len(counts) != len(shared) or sum(counts) != len(own):
            raise ValueError(
                f"{len(shared)} users and {len(own)} candidates, but counts for {len(counts)} and {sum(counts)}; "
                "give one number a user"
            )
        offsets = torch.tensor([0, *counts]).cumsum(0)
        return cls(shared.batch(), own.batch(), offsets, frozenset(f.name for f in shared.schema.fields))

    def __len__(self) -> int:
        return len(self.own)

    def to(self, device: torch.device) -> Candidates:
        """Return the candidates on ``device``."""
        return Candidates(self.shared.to(device), self.own.to(device), self.offsets.to(device), self.names)

    @cached_property
    def user(self) -> Tensor:
        """The user of each candidate, (N,)."""
        return rows_of(self.offsets, len(self))

    def check(self, schema: Schema) -> None:
        """Hold the fields against those that a model reads.

        Raises:
            ValueError: a field is in neither batch, in both, or unknown.
        """
        for ids, own, fields in (
            (self.shared.sparse, self.own.sparse, schema.sparse),
            (self.shared.sequences, self.own.sequences, schema.sequences),
        ):
            wanted = [f.name for f in fields]
            told = ([n for n in wanted if n in self.names], [n for n in wanted if n not in self.names])
            if (ids.keys(), own.keys()) != told:
                raise ValueError(
                    f"users bring {ids.keys()}, candidates {own.keys()}; the model reads {told[0]} and {told[1]}; "
                    "encode both by parts of its schema, schema.only(names)"
                )
        numbers = sum(f.name in self.names for f in schema.dense)
        found = self.shared.dense.shape[1], self.own.dense.shape[1]
        if found != (numbers, len(schema.dense) - numbers):
            raise ValueError(
                f"users bring {found[0]} numbers, candidates {found[1]}; the model reads {numbers} and "
                f"{len(schema.dense) - numbers}; encode both by parts of its schema, schema.only(names)"
            )

    def joined(self, schema: Schema) -> Batch:
        """Return plain rows, one a candidate, in which what is shared is repeated, (N,)."""
        dense = self.own.dense.new_empty(len(self), len(schema.dense))
        told = [f.name in self.names for f in schema.dense]
        if told:
            is_shared = torch.tensor(told, device=dense.device)
            dense[:, is_shared], dense[:, ~is_shared] = self.shared.dense[self.user], self.own.dense
        return Batch(
            dense=dense,
            sparse=self._joined(self.shared.sparse, self.own.sparse, schema.sparse),
            sequences=self._joined(self.shared.sequences, self.own.sequences, schema.sequences),
            label=self.own.label,
            group=self.own.group,
        )

    def _joined(
        self, shared: KeyedJaggedTensor, own: KeyedJaggedTensor, fields: Sequence[IdField]
    ) -> KeyedJaggedTensor:
        if not shared.keys():
            return own
        ids, lengths = [], []
        of_shared, of_own = _by_key(shared), _by_key(own)
        for f in fields:
            values, counts = (of_shared if f.name in self.names else of_own)[f.name]
            if f.name in self.names and f.kind == "categorical":
                values, counts = values[self.user], counts[self.user]
            elif f.name in self.names:
                starts = (counts.cumsum(0) - counts)[self.user]
                counts = counts[self.user]
                values = spread_ids(values, starts, counts)
            ids.append(values)
            lengths.append(counts)
        return KeyedJaggedTensor(
            keys=[f.name for f in fields],
            values=torch.cat(ids),
            lengths=torch.cat(lengths),
            stride=len(self),
            length_per_key=[len(one) for one in ids],
        )


def joined_rows(schema: Schema, shared: EncodedRows, own: EncodedRows, counts: Sequence[int]) -> EncodedRows:
    """Return plain encoded rows, one a candidate, in which what is shared is repeated.

    Args:
        schema: of the rows to be had.
        shared: the users, of a schema of some of its fields.
        own: the candidates, of a schema of the others.
        counts: candidates of each user, (U,).

    Example:
        >>> from ctr_models import example_rows
        >>> schema = Schema.of({"user": 10, "item": 20})
        >>> users, items = example_rows(schema.only(["user"]), rows=2), example_rows(schema.only(["item"]), rows=3)
        >>> rows = joined_rows(schema, users, items, [2, 1])
        >>> bool((rows.single[0] == users.single[0].repeat([2, 1])).all()), rows.single.shape
        (True, (2, 3))
    """
    if not shared.schema.fields:
        return replace(own, schema=schema)
    names = {f.name for f in shared.schema.fields}
    user = np.repeat(np.arange(len(counts)), counts)
    told = np.array([f.name in names for f in schema.dense], dtype=bool)
    dense = np.empty((len(own), len(told)), dtype=np.float32)
    dense[:, told], dense[:, ~told] = shared.dense[user], own.dense
    told = np.array([f.name in names for f in schema.sparse if f.kind == "categorical"], dtype=bool)
    single = np.empty((len(told), len(own)), dtype=np.int32)
    single[told], single[~told] = shared.single[:, user], own.single
    ragged = dict(own.ragged)
    for name, values in shared.ragged.items():
        ids, lengths = values.take(user)
        ragged[name] = Ragged(ids, np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]))
    return EncodedRows(schema=schema, dense=dense, single=single, ragged=ragged, label=own.label, group=own.group)


def _by_key(ids: KeyedJaggedTensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Return ids and lengths of each key."""
    if not ids.keys():
        return {}
    lengths = ids.lengths().view(len(ids.keys()), ids.stride())
    return dict(zip(ids.keys(), zip(ids.values().split(ids.length_per_key()), lengths, strict=True), strict=True))


def spread_ids(values: Tensor, starts: Tensor, lengths: Tensor) -> Tensor:
    """Return one after the other the pieces of ``values`` that begin at ``starts`` and are ``lengths`` long.

    Example:
        >>> spread_ids(torch.tensor([7, 8, 9]), torch.tensor([1, 0, 1]), torch.tensor([2, 1, 2]))
        tensor([8, 9, 7, 8, 9])
    """
    lengths, ends = lengths.long(), lengths.cumsum(0)
    total = int(ends[-1]) if len(ends) else 0
    # The place of each value in its own piece, then shifted to where that piece begins.
    moved = torch.repeat_interleave(starts.long() - (ends - lengths), lengths, output_size=total)
    return values[torch.arange(total, device=values.device) + moved]


def takes_candidates(forward: Forward) -> Forward:
    """Mark a model's ``forward`` as one that takes :class:`Candidates` too and computes what is shared once a user.

    Of such a model's layers, each must take :class:`ctr_models.shared_rows.SharedRows` where it gets what
    ``GatedEmbedding`` returns. A subclass that writes its own ``forward`` says so anew.
    """
    forward.takes_candidates = True  # type: ignore[attr-defined]
    return forward
