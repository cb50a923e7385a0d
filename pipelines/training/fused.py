"""Embedding tables that fbgemm looks up and updates: only the rows of a batch are ever touched."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor, nn
from torchrec.modules.embedding_configs import PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

from pipelines.training.optimizers import SELECTION

KINDS = {
    "sgd": EmbOptimType.EXACT_SGD,
    "adagrad": EmbOptimType.EXACT_ADAGRAD,
    "rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
    "adam": EmbOptimType.ADAM,
}


class FusedTables(nn.Module):
    """Tables of equal pooling in one fbgemm operator; the backward pass updates them.

    The parameters alias the operator's storage and carry the names that the plain collection gives them, so a
    state dict goes from one to the other. They must not be given to another optimiser.

    Args:
        configs: TorchRec's table configs.
        optimizer: a key of :data:`KINDS`.
        lr: learning rate.
        eps: added to the root of the accumulated squares.
        device: where the tables live.
    """

    def __init__(self, configs: list[Any], optimizer: str, lr: float, eps: float, device: torch.device) -> None:
        super().__init__()
        self.configs = configs
        self._features = [name for config in configs for name in config.feature_names]
        pooling = getattr(configs[0], "pooling", PoolingType.SUM)
        on_cpu = device.type == "cpu"
        self.operator = SplitTableBatchedEmbeddingBagsCodegen(
            [
                (
                    config.num_embeddings,
                    config.embedding_dim,
                    EmbeddingLocation.HOST if on_cpu else EmbeddingLocation.DEVICE,
                    ComputeDevice.CPU if on_cpu else ComputeDevice.CUDA,
                )
                for config in configs
            ],
            feature_table_map=[i for i, config in enumerate(configs) for _ in config.feature_names],
            pooling_mode=PoolingMode.MEAN if pooling == PoolingType.MEAN else PoolingMode.SUM,
            optimizer=KINDS[optimizer],
            learning_rate=lr,
            eps=eps,
            device=device,
        )

    def weights(self) -> dict[str, Tensor]:
        """Return each table's storage, (rows, dim), by table name."""
        return dict(zip([c.name for c in self.configs], self.operator.split_embedding_weights(), strict=True))

    def state(self) -> dict[str, Tensor]:
        """Return the optimiser's tensors by ``<table>.<position>``."""
        found = {}
        states = self.operator.split_optimizer_states()  # empty for SGD
        for config, tensors in zip(self.configs, states, strict=bool(states)):
            for position, tensor in enumerate(tensors):
                found[f"{config.name}.{position}"] = tensor
        return found

    def forward(self, values: Tensor, offsets: Tensor) -> Tensor:
        """Look ids up.

        Args:
            values: ids, all rows of the first feature, then all of the next.
            offsets: where each row's ids begin, (features * rows + 1,).

        Returns:
            Pooled embeddings, (rows, sum of dims).
        """
        return self.operator(values, offsets)


def _register(holder: nn.ModuleDict, tables: FusedTables, source: nn.ModuleDict) -> None:
    """Copy the initial weights and name the storage as the plain collection does."""
    for name, weight in tables.weights().items():
        weight.copy_(source[name].weight.detach())
        holder[name] = nn.Module()
        holder[name].register_parameter("weight", nn.Parameter(weight, requires_grad=False))


class FusedBags(nn.Module):
    """Stands in for an EmbeddingBagCollection.

    Args:
        plain: the collection whose weights are taken over.
        optimizer: a key of :data:`KINDS`.
        lr: learning rate.
        eps: of the optimiser.
        device: where the tables live.
    """

    def __init__(
        self, plain: EmbeddingBagCollection, optimizer: str, lr: float, eps: float, device: torch.device
    ) -> None:
        super().__init__()
        self._configs = plain.embedding_bag_configs()
        groups = defaultdict(list)
        for config in self._configs:
            groups[config.pooling].append(config)
        self._groups = [FusedTables(configs, optimizer, lr, eps, device) for configs in groups.values()]
        self._keys = [name for group in self._groups for name in group._features]
        self._dims = [c.embedding_dim for g in self._groups for c in g.configs for _ in c.feature_names]
        self.embedding_bags = nn.ModuleDict()
        for group in self._groups:
            _register(self.embedding_bags, group, plain.embedding_bags)

    def embedding_bag_configs(self) -> list[Any]:
        """Return TorchRec's table configs."""
        return self._configs

    def tables(self) -> list[FusedTables]:
        """Return the operators."""
        return self._groups

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Return pooled embeddings of every feature, (B, sum of dims)."""
        if len(self._groups) == 1 and features.keys() == self._keys:
            values = self._groups[0](features.values(), features.offsets())
        else:
            order = {key: i for i, key in enumerate(features.keys())}
            parts = []
            for group in self._groups:
                own = features.permute([order[name] for name in group._features])
                parts.append(group(own.values(), own.offsets()))
            values = torch.cat(parts, dim=1)
        return KeyedTensor(keys=self._keys, values=values, length_per_key=self._dims)


class FusedSequences(nn.Module):
    """Stands in for an EmbeddingCollection: one embedding an id, unpooled.

    Each table is an operator of its own in which every id is a bag of one, since fbgemm has no unpooled tables
    on CPU. All features of a table go through it together, so that a row is updated once a step.

    Args:
        plain: the collection whose weights are taken over.
        optimizer: a key of :data:`KINDS`.
        lr: learning rate.
        eps: of the optimiser.
        device: where the tables live.
    """

    def __init__(
        self, plain: EmbeddingCollection, optimizer: str, lr: float, eps: float, device: torch.device
    ) -> None:
        super().__init__()
        self._configs = plain.embedding_configs()
        self._groups = []
        self.embeddings = nn.ModuleDict()
        for config in self._configs:
            one = _OneFeature(config.name, config.num_embeddings, config.embedding_dim, [config.name])
            group = FusedTables([one], optimizer, lr, eps, device)
            self._groups.append(group)
            _register(self.embeddings, group, plain.embeddings)

    def embedding_configs(self) -> list[Any]:
        """Return TorchRec's table configs."""
        return self._configs

    def tables(self) -> list[FusedTables]:
        """Return the operators."""
        return self._groups

    def forward(self, features: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        """Return each feature's embeddings, (total ids, dim), with the lengths of its rows."""
        jagged = features.to_dict()
        found = {}
        for config, group in zip(self._configs, self._groups, strict=True):
            own = [jagged[name] for name in config.feature_names]
            ids = torch.cat([j.values() for j in own])
            rows = group(ids, torch.arange(len(ids) + 1, dtype=ids.dtype, device=ids.device))
            pieces = rows.split([len(j.values()) for j in own])
            for name, piece, j in zip(config.feature_names, pieces, own, strict=True):
                found[name] = JaggedTensor(values=piece, lengths=j.lengths(), offsets=j.offsets())
        return found


class _OneFeature:
    """What :class:`FusedTables` reads of a config, with the table as its only feature."""

    def __init__(self, name: str, num_embeddings: int, embedding_dim: int, feature_names: list[str]) -> None:
        self.name, self.num_embeddings, self.embedding_dim = name, num_embeddings, embedding_dim
        self.feature_names = feature_names


def fuse(
    model: nn.Module, optimizer: str, lr: float, eps: float, device: torch.device
) -> list[tuple[str, FusedTables]]:
    """Replace every TorchRec collection of the model, in place; the logits of a selection stay as they are.

    Returns:
        The operators, each with the path of its collection in the model.
    """
    found = []
    for path, module in list(model.named_modules()):
        kinds: dict[type, Any] = {EmbeddingBagCollection: FusedBags, EmbeddingCollection: FusedSequences}
        kind = kinds.get(type(module))
        if kind is not None and not path.startswith(SELECTION):
            parent, _, name = path.rpartition(".")
            fused = kind(module, optimizer, lr, eps, device)
            setattr(model.get_submodule(parent), name, fused)
            found += [(path, tables) for tables in fused.tables()]
    return found
