"""From a Batch to vectors: the only place where a model touches ids."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

from ctr_models.batch import Batch
from ctr_models.errors import ConfigError, nearest
from ctr_models.schema import IdField, Schema

# TorchRec asks torch.fx a question on every look-up that torch answers with a warning.
logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)


@dataclass
class Embedded:
    """The vectors of a batch.

    Args:
        flat: all fields side by side, (B, D); a sequence stands in it as the mean of its vectors.
        names: the fields, in the order in which they stand in ``flat``.
        dims: their dimensions.
        sequences: the vectors of each behaviour history, (total, d) with lengths (B,).
    """

    flat: Tensor
    names: tuple[str, ...]
    dims: tuple[int, ...]
    sequences: dict[str, JaggedTensor] = field(default_factory=dict)

    def stacked(self) -> Tensor:
        """Return the fields as (B, F, d), a view; all must have one dimension."""
        return self.flat.view(self.flat.shape[0], len(self.names), self.dims[0])

    def field(self, name: str) -> Tensor:
        """Return one field, (B, d), a view."""
        position = self.names.index(name)
        start = sum(self.dims[:position])
        return self.flat[:, start : start + self.dims[position]]


class FeatureEmbedding(nn.Module):
    """Embeds every field of a batch: ids by table, numbers as the number times a learned vector.

    Fields of several values and sequences are pooled by the mean, and are zero when empty. Tables that no
    sequence uses live in ``bags``, an EmbeddingBagCollection. It sums, and the mean is taken here: under mixed
    sharding schemes TorchRec divides by the length twice. Tables that a sequence uses live in ``lookups``, an
    EmbeddingCollection for each dimension, with all the fields that share them. Both are called with a
    KeyedJaggedTensor whose keys are exactly theirs, as the sharded collections require.

    Args:
        schema: what the batch holds.
        std: standard deviation of the initial vectors, which are N(0, std).
        prefix: put before table names, to tell a model's several embeddings apart.
        fields: the fields to embed; all by default.

    Raises:
        ConfigError: ``fields`` names an unknown field, or none is left.

    Example:
        >>> from ctr_models import Schema, example_batch
        >>> schema = Schema.of({"user": 10, "item": 20}, dense=["price"], dim=4)
        >>> embedded = FeatureEmbedding(schema)(example_batch(schema, rows=3))
        >>> embedded.flat.shape, embedded.stacked().shape, embedded.names
        (torch.Size([3, 12]), torch.Size([3, 3, 4]), ('price', 'user', 'item'))
    """

    def __init__(
        self, schema: Schema, *, std: float = 1e-4, prefix: str = "", fields: Collection[str] | None = None
    ) -> None:
        super().__init__()
        known = [f.name for f in schema.fields]
        for name in fields or ():
            if name not in known:
                raise ConfigError(f"no field {name!r}", where="model", remedy=nearest(name, known))
        kept = schema if fields is None else schema.only(list(fields))
        if not kept.fields:
            raise ConfigError("no field to embed", where="model", remedy="give the model at least one feature")
        self.std, self.prefix = std, prefix

        history = {f.table for f in kept.sequences}
        pooled = [f for f in kept.sparse if f.table not in history]
        single = [f for f in kept.sparse if f.table in history]
        init = partial(nn.init.normal_, std=std)
        self.bags = (
            EmbeddingBagCollection(
                tables=[
                    EmbeddingBagConfig(
                        name=prefix + table,
                        num_embeddings=users[0].rows,
                        embedding_dim=users[0].dim,
                        feature_names=[f.name for f in users],
                        pooling=PoolingType.SUM,
                        init_fn=init,
                    )
                    for table, users in _by_table(pooled).items()
                ]
            )
            if pooled
            else None
        )
        by_dim: dict[int, dict[str, list[IdField]]] = {}
        for table, users in _by_table([*single, *kept.sequences]).items():
            by_dim.setdefault(users[0].dim, {})[table] = users
        self.lookups = nn.ModuleDict(
            {
                str(dim): EmbeddingCollection(
                    tables=[
                        EmbeddingConfig(
                            name=prefix + table,
                            num_embeddings=users[0].rows,
                            embedding_dim=dim,
                            feature_names=[f.name for f in users],
                            init_fn=init,
                        )
                        for table, users in tables.items()
                    ]
                )
                for dim, tables in by_dim.items()
            }
        )
        self.table_of: dict[str, str] = {prefix + f.table: f.table for f in (*kept.sparse, *kept.sequences)}
        """The schema's table by the name that it carries in the collections."""

        dense = list(kept.dense)
        self._dense_dims = [f.dim for f in dense]
        self.dense_vectors: nn.Parameter | None = None
        if dense:
            self.dense_vectors = nn.Parameter(torch.empty(sum(self._dense_dims)).normal_(std=std))  # (sum d,)
            columns = [i for i, f in enumerate(schema.dense) for k in dense if k.name == f.name]
            self._all_dense = len(columns) == len(schema.dense)
            self.register_buffer("_columns", torch.tensor(columns), persistent=False)
            repeats = torch.tensor(columns).repeat_interleave(torch.tensor(self._dense_dims))
            self.register_buffer("_repeats", repeats, persistent=False)

        self._bag_names = [f.name for users in _by_table(pooled).values() for f in users]
        self._cuts = _cuts(
            [f for users in _by_table(pooled).values() for f in users], [f.name for f in schema.sparse]
        )
        self._single = [(f.name, str(f.dim), f.kind) for f in single]
        self._sequences = [(f.name, str(f.dim)) for f in kept.sequences]
        dims = {f.name: f.dim for f in kept.fields}
        self.names: tuple[str, ...] = (
            *(f.name for f in dense),
            *self._bag_names,
            *(f.name for f in single),
            *(f.name for f in kept.sequences),
        )
        self.dims: tuple[int, ...] = tuple(dims[n] for n in self.names)
        self._pick_bags = _Pick([f.name for f in schema.sparse], [f.name for f in pooled])
        self._pick_lookups = nn.ModuleDict()
        for dim in by_dim:
            self._pick_lookups[str(dim)] = _PickBoth(
                schema, [f.name for f in single if f.dim == dim], [f.name for f in kept.sequences if f.dim == dim]
            )

    @property
    def width(self) -> int:
        """Length D of one row of ``flat``."""
        return sum(self.dims)

    @property
    def uniform(self) -> bool:
        """Whether all fields have one dimension."""
        return len(set(self.dims)) == 1

    def table_parameters(self) -> Iterator[nn.Parameter]:
        """Yield the weights of the tables."""
        if self.bags is not None:
            yield from self.bags.parameters()
        yield from self.lookups.parameters()

    def dense_parameters(self) -> Iterator[nn.Parameter]:
        """Yield the learned vectors of the numeric fields, an ordinary parameter that every rank holds."""
        if self.dense_vectors is not None:
            yield self.dense_vectors

    def embedding_parameters(self) -> Iterator[nn.Parameter]:
        """Yield everything that counts as an embedding for regularisation: tables, then numeric vectors."""
        yield from self.table_parameters()
        yield from self.dense_parameters()

    def forward(self, batch: Batch) -> Embedded:
        """Return the batch's vectors."""
        # All look-ups are started before any result is read: sharded collections answer lazily.
        pooled = self.bags(self._pick_bags(batch.sparse)) if self.bags is not None else None
        looked_up = {
            dim: collection(self._pick_lookups[dim](batch.sparse, batch.sequences))
            for dim, collection in self.lookups.items()
        }
        parts: list[Tensor] = []
        if self.dense_vectors is not None:
            parts.append(self._dense(batch.dense))
        if pooled is not None:
            values = self._in_order(pooled)
            for start, stop, key in self._cuts:
                part = values if len(self._cuts) == 1 else values[:, start:stop]
                parts.append(part if key is None else part / _lengths(batch.sparse, key))
        for name, dim, kind in self._single:
            vectors = looked_up[dim][name]
            parts.append(vectors.values() if kind == "categorical" else mean_pool(vectors))
        sequences = {name: looked_up[dim][name] for name, dim in self._sequences}
        parts.extend(mean_pool(vectors) for vectors in sequences.values())
        flat = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return Embedded(flat, self.names, self.dims, sequences)

    def _dense(self, dense: Tensor) -> Tensor:
        if len(set(self._dense_dims)) > 1:
            return dense[:, self._repeats] * self.dense_vectors  # (B, sum d)
        if not self._all_dense:
            dense = dense[:, self._columns]
        vectors = self.dense_vectors.view(-1, self._dense_dims[0])  # type: ignore[union-attr]
        return (dense.unsqueeze(2) * vectors).flatten(1)  # (B, N, 1) * (N, d)

    def _in_order(self, pooled: KeyedTensor) -> Tensor:
        # Sharded by more than one scheme, a collection returns its fields scheme by scheme.
        if list(pooled.keys()) == self._bag_names:
            return pooled.values()
        return KeyedTensor.regroup([pooled], [self._bag_names])[0]


def mean_pool(vectors: JaggedTensor) -> Tensor:
    """Return the mean of each row's vectors, (B, d); zeros for a row that has none.

    Example:
        >>> jagged = JaggedTensor(values=torch.tensor([[1.0], [3.0]]), lengths=torch.tensor([2, 0]))
        >>> mean_pool(jagged)
        tensor([[2.],
                [0.]])
    """
    values, offsets = vectors.values(), vectors.offsets()
    rows = torch.arange(values.shape[0], dtype=offsets.dtype, device=values.device)
    return F.embedding_bag(rows, values, offsets, mode="mean", include_last_offset=True)


def _cuts(fields: list[IdField], keys: list[str]) -> list[tuple[int, int, int | None]]:
    """Return runs of columns: of categorical fields side by side, or of one multi field with its key's index."""
    cuts: list[tuple[int, int, int | None]] = []
    start = 0
    for f in fields:
        stop = start + f.dim
        if f.kind == "multi":
            cuts.append((start, stop, keys.index(f.name)))
        elif cuts and cuts[-1][2] is None:
            cuts[-1] = (cuts[-1][0], stop, None)
        else:
            cuts.append((start, stop, None))
        start = stop
    return cuts


def _lengths(ids: KeyedJaggedTensor, key: int) -> Tensor:
    """Return how many ids each row has under a key, at least 1, (B, 1)."""
    return ids.lengths().view(-1, ids.stride())[key].clamp(min=1).unsqueeze(1)


def _by_table(fields: Collection[IdField]) -> dict[str, list[IdField]]:
    tables: dict[str, list[IdField]] = {}
    for f in fields:
        tables.setdefault(f.table, []).append(f)
    return tables


class _Pick(nn.Module):
    """Cuts the wanted keys out of a KeyedJaggedTensor whose keys are known; hands it on when all are wanted."""

    def __init__(self, keys: list[str], wanted: list[str]) -> None:
        super().__init__()
        self._whole = keys == wanted
        self._indices = [keys.index(name) for name in wanted]
        self.register_buffer("_tensor", torch.tensor(self._indices, dtype=torch.int32), persistent=False)

    def forward(self, ids: KeyedJaggedTensor) -> KeyedJaggedTensor:
        return ids if self._whole else ids.permute(self._indices, self._tensor)


class _PickBoth(nn.Module):
    """Joins the wanted keys of both KeyedJaggedTensors of a batch."""

    def __init__(self, schema: Schema, sparse: list[str], sequences: list[str]) -> None:
        super().__init__()
        self._sparse = _Pick([f.name for f in schema.sparse], sparse) if sparse else None
        self._sequences = _Pick([f.name for f in schema.sequences], sequences)

    def forward(self, sparse: KeyedJaggedTensor, sequences: KeyedJaggedTensor) -> KeyedJaggedTensor:
        histories = self._sequences(sequences)
        if self._sparse is None:
            return histories
        return KeyedJaggedTensor.concat([self._sparse(sparse), histories])
