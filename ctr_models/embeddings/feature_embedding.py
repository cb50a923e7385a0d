"""From a Batch to vectors: the only place where a model touches ids."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

from ctr_models.batch import Batch
from ctr_models.candidates import Candidates
from ctr_models.embeddings.alignment import Alignment
from ctr_models.errors import ConfigError, nearest
from ctr_models.schema import IdField, Schema
from ctr_models.shared_rows import Rows, SharedRows, columns_of, joined

# TorchRec asks torch.fx a question on every look-up that torch answers with a warning.
logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)


@dataclass
class Embedded:
    """The vectors of a batch.

    Args:
        flat: all fields side by side, (B, D); a sequence stands in it as the mean of its vectors. Of candidates,
            rows that keep apart what is shared.
        names: the fields, in the order in which they stand in ``flat``.
        dims: their dimensions.
        sequences: the vectors of each behaviour history, (total, d) with lengths (B,); of candidates whose users
            share it, with lengths (U,).
    """

    flat: Rows
    names: tuple[str, ...]
    dims: tuple[int, ...]
    sequences: dict[str, JaggedTensor] = field(default_factory=dict)

    def stacked(self) -> Tensor:
        """Return the fields as (B, F, d), a view of plain rows; all must have one dimension."""
        flat = joined(self.flat)
        return flat.view(flat.shape[0], len(self.names), self.dims[0])

    def field(self, name: str) -> Tensor:
        """Return one field, (B, d), a view of plain rows."""
        if isinstance(self.flat, SharedRows):
            return self.flat.field(name)
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
        unpooled: keep the tables of fields of several values in ``lookups`` too.

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
        self,
        schema: Schema,
        *,
        std: float = 1e-4,
        prefix: str = "",
        fields: Collection[str] | None = None,
        unpooled: bool = False,
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
        self._schema, self._kept = schema, kept
        self._masks: tuple[Callable[[Batch], Mapping[str, Tensor]], ...] = ()  # in a tuple: no submodule
        self.names = _order(kept)
        self._build(unpooled)
        self.align = Alignment((*kept.sparse, *kept.sequences), prefix)
        self._plain = not len(self.align)
        self.register_load_state_dict_pre_hook(_rehome)

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

        self._id_fields = {f.name: f for f in (*kept.sparse, *kept.sequences)}
        dims = {f.name: f.dim for f in kept.fields}
        self.dims: tuple[int, ...] = tuple(dims[n] for n in self.names)

    def _build(self, unpooled: bool) -> None:
        """Make the tables."""
        schema, kept = self._schema, self._kept
        apart = {f.table for f in kept.sequences}
        apart |= {f.table for f in kept.sparse if f.kind == "multi"} if unpooled else set()
        pooled = [f for f in kept.sparse if f.table not in apart]
        single = [f for f in kept.sparse if f.table in apart]
        init = partial(nn.init.normal_, std=self.std)
        self.bags = (
            EmbeddingBagCollection(
                tables=[
                    EmbeddingBagConfig(
                        name=self.prefix + table,
                        num_embeddings=users[0].rows,
                        embedding_dim=users[0].stored,
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
            by_dim.setdefault(users[0].stored, {})[table] = users
        self.lookups = nn.ModuleDict(
            {
                str(dim): EmbeddingCollection(
                    tables=[
                        EmbeddingConfig(
                            name=self.prefix + table,
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
        bags = [f for users in _by_table(pooled).values() for f in users]
        self.bag_names, self._bag_dims = [f.name for f in bags], [f.stored for f in bags]
        self._cuts = _cuts(bags, [f.name for f in schema.sparse])
        self._single = [(f.name, str(f.stored), f.kind) for f in single]
        self._sequences = [(f.name, str(f.stored)) for f in kept.sequences]
        self._multi_bags = [
            (f.name, [g.name for g in schema.sparse].index(f.name)) for f in bags if f.kind == "multi"
        ]
        self._pick_bags = _Pick(schema.sparse, [f.name for f in pooled])
        self._pick_lookups = nn.ModuleDict()
        for dim in by_dim:
            self._pick_lookups[str(dim)] = _PickBoth(
                schema,
                [f.name for f in single if f.stored == dim],
                [f.name for f in kept.sequences if f.stored == dim],
            )

    def mask(self, masks: Callable[[Batch], Mapping[str, Tensor]]) -> None:
        """Multiply every value's vector by a mask from now on, before several are pooled.

        Args:
            masks: returns for each id field the masks of a batch's values: (B, 1) of a categorical field, (T, 1) of
                a field with T values in all. A module that is given stays outside this one.
        """
        if self._multi_bags:
            weights = self.state_dict()
            self._build(unpooled=True)
            self.load_state_dict(weights)
        self._masks, self._plain = (masks,), False

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

    def tables(self) -> dict[str, nn.Parameter]:
        """Return the weights of each of the schema's tables, (rows, d)."""
        found = {}
        for collection in (self.bags, *self.lookups.values()):
            holder = getattr(collection, "embedding_bags", None) or getattr(collection, "embeddings", {})
            found.update({self.table_of[name]: one.weight for name, one in holder.items()})
        return found

    def dense_parameters(self) -> Iterator[nn.Parameter]:
        """Yield the learned vectors of the numeric fields, an ordinary parameter that every rank holds."""
        if self.dense_vectors is not None:
            yield self.dense_vectors

    def embedding_parameters(self) -> Iterator[nn.Parameter]:
        """Yield everything that counts as an embedding for regularisation: tables, then numeric vectors."""
        yield from self.table_parameters()
        yield from self.dense_parameters()

    def look_up(self, batch: Batch) -> tuple[Tensor | None, dict[str, JaggedTensor]]:
        """Return what ``bags`` holds, field by field, summed (B, S), and each field's vectors from ``lookups``."""
        # All look-ups are started before any result is read: sharded collections answer lazily.
        pooled = self.bags(self._pick_bags(batch.sparse)) if self.bags is not None else None
        looked_up = {
            dim: collection(self._pick_lookups[dim](batch.sparse, batch.sequences))
            for dim, collection in self.lookups.items()
        }
        names = [*((name, dim) for name, dim, _ in self._single), *self._sequences]
        vectors = {name: looked_up[dim][name] for name, dim in names}
        return None if pooled is None else self._in_order(pooled), vectors

    def forward(self, batch: Batch | Candidates) -> Embedded:
        """Return the batch's vectors; of candidates, those that are shared once a user."""
        if isinstance(batch, Candidates):
            return self._of_candidates(batch)
        values, vectors = self.look_up(batch)
        if not self._plain:
            return self._by_field(batch, values, vectors)
        parts: list[Tensor] = []
        if self.dense_vectors is not None:
            parts.append(self._dense(batch.dense))
        if values is not None:
            for start, stop, key in self._cuts:
                part = values if len(self._cuts) == 1 else values[:, start:stop]
                parts.append(part if key is None else part / _lengths(batch.sparse, key))
        for name, _, kind in self._single:
            parts.append(vectors[name].values() if kind == "categorical" else mean_pool(vectors[name]))
        sequences = {name: vectors[name] for name, _ in self._sequences}
        parts.extend(mean_pool(own) for own in sequences.values())
        flat = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return Embedded(flat, self.names, self.dims, sequences)

    def _of_candidates(self, candidates: Candidates) -> Embedded:
        if self._masks:  # which are told of whole rows
            return self.forward(candidates.joined(self._schema))
        tables = self.tables()
        shared, sequences = self._of_fields(candidates, tables, shared=True)
        own, others = self._of_fields(candidates, tables, shared=False)
        rows = SharedRows(shared, own, candidates.offsets, columns_of(self.names, self.dims, candidates.names))
        return Embedded(rows, self.names, self.dims, sequences | others)

    def _of_fields(
        self, candidates: Candidates, tables: Mapping[str, Tensor], *, shared: bool
    ) -> tuple[Tensor, dict[str, JaggedTensor]]:
        """Look up the fields of users, or those of candidates, straight in unsharded tables."""
        batch = candidates.shared if shared else candidates.own
        names = [name for name in self.names if (name in candidates.names) == shared]
        numbers: dict[str, Tensor] = {}
        if self.dense_vectors is not None:
            columns = [f.name for f in self._schema.dense if (f.name in candidates.names) == shared]
            for d, vector in zip(self._kept.dense, self.dense_vectors.split(self._dense_dims), strict=True):
                if d.name in columns:
                    numbers[d.name] = batch.dense[:, columns.index(d.name), None] * vector
        ids = _ids_by_key(batch.sparse) | _ids_by_key(batch.sequences)
        parts: list[Tensor] = []
        sequences: dict[str, JaggedTensor] = {}
        for name in names:
            if name in numbers:
                parts.append(numbers[name])
                continue
            f = self._id_fields[name]
            x = torch.embedding(tables[f.table], ids[name])  # straight: this is once a field of every request
            if not self._plain:
                x = self.align(name, x)
            if f.kind == "categorical":
                parts.append(x)
                continue
            given = batch.sequences if f.kind == "sequence" else batch.sparse
            own = JaggedTensor(
                values=x, lengths=given.lengths().view(len(given.keys()), -1)[given.keys().index(name)]
            )
            parts.append(mean_pool(own))
            if f.kind == "sequence":
                sequences[name] = own
        return torch.cat(parts, dim=1) if parts else batch.dense.new_empty(batch.dense.shape[0], 0), sequences

    def _by_field(self, batch: Batch, values: Tensor | None, vectors: dict[str, JaggedTensor]) -> Embedded:
        """Mask and align what was looked up."""
        masks = self._masks[0](batch) if self._masks else {}
        parts: dict[str, Tensor] = {}
        if self.dense_vectors is not None:
            names = [f.name for f in self._kept.dense]
            parts.update(zip(names, self._dense(batch.dense).split(self._dense_dims, dim=1), strict=True))
        if values is not None:
            parts.update(zip(self.bag_names, values.split(self._bag_dims, dim=1), strict=True))
            for name, key in self._multi_bags:
                parts[name] = parts[name] / _lengths(batch.sparse, key)
            for name in self.bag_names:
                parts[name] = self.align(name, parts[name] * masks[name] if masks else parts[name])
        own: dict[str, JaggedTensor] = {}
        for name, jagged in vectors.items():
            x = self.align(name, jagged.values() * masks[name] if masks else jagged.values())
            own[name] = JaggedTensor(values=x, lengths=jagged.lengths(), offsets=jagged.offsets())
        for name, _, kind in self._single:
            parts[name] = own[name].values() if kind == "categorical" else mean_pool(own[name])
        sequences = {name: own[name] for name, _ in self._sequences}
        parts.update({name: mean_pool(jagged) for name, jagged in sequences.items()})
        return Embedded(torch.cat([parts[n] for n in self.names], dim=1), self.names, self.dims, sequences)

    def _dense(self, dense: Tensor) -> Tensor:
        if len(set(self._dense_dims)) > 1:
            return dense[:, self._repeats] * self.dense_vectors  # (B, sum d)
        if not self._all_dense:
            dense = dense[:, self._columns]
        vectors = self.dense_vectors.view(-1, self._dense_dims[0])  # type: ignore[union-attr]
        return (dense.unsqueeze(2) * vectors).flatten(1)  # (B, N, 1) * (N, d)

    def _in_order(self, pooled: KeyedTensor) -> Tensor:
        # Sharded by more than one scheme, a collection returns its fields scheme by scheme.
        if list(pooled.keys()) == self.bag_names:
            return pooled.values()
        return KeyedTensor.regroup([pooled], [self.bag_names])[0]


def _ids_by_key(ids: KeyedJaggedTensor) -> dict[str, Tensor]:
    return dict(zip(ids.keys(), ids.values().split(ids.length_per_key()), strict=True)) if ids.keys() else {}


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


def _order(schema: Schema) -> tuple[str, ...]:
    """Return the fields as they stand in ``flat``: numbers, pooled tables, tables of sequences, sequences."""
    history = {f.table for f in schema.sequences}
    pooled = _by_table([f for f in schema.sparse if f.table not in history])
    return (
        *(f.name for f in schema.dense),
        *(f.name for users in pooled.values() for f in users),
        *(f.name for f in schema.sparse if f.table in history),
        *(f.name for f in schema.sequences),
    )


def _rehome(module: FeatureEmbedding, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Let weights go between two embeddings of which one keeps a table in ``bags`` and the other in ``lookups``."""
    for name, weight in module.named_parameters():
        place, _, table = name.removesuffix(".weight").rpartition(".")
        if prefix + name in state or not place.endswith((".embedding_bags", ".embeddings")):
            continue
        width = weight.shape[1]
        for other in ("bags.embedding_bags", f"lookups.{width}.embeddings"):
            key = f"{prefix}{other}.{table}.weight"
            if key in state:
                state[prefix + name] = state.pop(key)


def _by_table(fields: Collection[IdField]) -> dict[str, list[IdField]]:
    tables: dict[str, list[IdField]] = {}
    for f in fields:
        tables.setdefault(f.table, []).append(f)
    return tables


class _Pick(nn.Module):
    """Cuts the wanted keys out of a KeyedJaggedTensor of these fields; hands it on when all are wanted."""

    def __init__(self, fields: Sequence[IdField], wanted: list[str]) -> None:
        super().__init__()
        keys = [f.name for f in fields]
        self._wanted, self._whole = wanted, keys == wanted
        self._one_id_each = all(f.kind == "categorical" for f in fields)
        self._indices = [keys.index(name) for name in wanted]
        self.register_buffer("_tensor", torch.tensor(self._indices, dtype=torch.int32), persistent=False)

    def forward(self, ids: KeyedJaggedTensor) -> KeyedJaggedTensor:
        if self._whole:
            return ids
        if not self._one_id_each:
            return ids.permute(self._indices, self._tensor)
        rows = ids.stride()  # a rectangle of ids, (F, B): plain indexing takes half the time and can be traced
        return KeyedJaggedTensor(
            keys=self._wanted,
            values=ids.values().view(-1, rows)[self._tensor].flatten(),
            lengths=ids.lengths().view(-1, rows)[self._tensor].flatten(),
            stride=rows,
            length_per_key=[rows] * len(self._wanted),
        )


class _PickBoth(nn.Module):
    """Joins the wanted keys of both KeyedJaggedTensors of a batch."""

    def __init__(self, schema: Schema, sparse: list[str], sequences: list[str]) -> None:
        super().__init__()
        self._sparse = _Pick(schema.sparse, sparse) if sparse else None
        self._sequences = _Pick(schema.sequences, sequences)

    def forward(self, sparse: KeyedJaggedTensor, sequences: KeyedJaggedTensor) -> KeyedJaggedTensor:
        histories = self._sequences(sequences)
        if self._sparse is None:
            return histories
        return KeyedJaggedTensor.concat([self._sparse(sparse), histories])
