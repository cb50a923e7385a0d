"""Embedding tables that fbgemm looks up and updates: only the rows of a batch are ever touched."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from types import SimpleNamespace
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
            pooling_mode=PoolingMode.MEAN if configs[0].pooling == PoolingType.MEAN else PoolingMode.SUM,
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


class _Fused(nn.Module):
    """Stands in for a collection of TorchRec's.

    Args:
        groups: configs of the tables that go into one operator.
        make: makes an operator of such a group.
    """

    def __init__(self, groups: Iterable[list[Any]], make: Callable[[list[Any]], FusedTables]) -> None:
        super().__init__()
        self._groups = [make(configs) for configs in groups]

    def tables(self) -> list[FusedTables]:
        """Return the operators."""
        return self._groups

    def _named(self, plain: nn.ModuleDict) -> nn.ModuleDict:
        """Take over the weights of the plain collection, and name the storage as it does."""
        holder = nn.ModuleDict()
        for name, weight in [entry for group in self._groups for entry in group.weights().items()]:
            weight.copy_(plain[name].weight.detach())
            holder[name] = nn.Module()
            holder[name].register_parameter("weight", nn.Parameter(weight, requires_grad=False))
        return holder


class FusedBags(_Fused):
    """Stands in for an EmbeddingBagCollection: an operator for each way of pooling."""

    def __init__(self, plain: EmbeddingBagCollection, make: Callable[[list[Any]], FusedTables]) -> None:
        self._configs = plain.embedding_bag_configs()
        groups = defaultdict(list)
        for config in self._configs:
            groups[config.pooling].append(config)
        super().__init__(groups.values(), make)
        self._keys = [name for group in self._groups for name in group._features]
        self._dims = [c.embedding_dim for g in self._groups for c in g.configs for _ in c.feature_names]
        self.embedding_bags = self._named(plain.embedding_bags)

    def embedding_bag_configs(self) -> list[Any]:
        """Return TorchRec's table configs."""
        return self._configs

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


class FusedSequences(_Fused):
    """Stands in for an EmbeddingCollection: one embedding an id, unpooled.

    Each table is an operator of its own in which every id is a bag of one, since fbgemm has no unpooled tables
    on CPU. All features of a table go through it together, so that a row is updated once a step.
    """

    def __init__(self, plain: EmbeddingCollection, make: Callable[[list[Any]], FusedTables]) -> None:
        self._configs = plain.embedding_configs()
        # What FusedTables reads of a config, with the table as its only feature.
        ones = [
            SimpleNamespace(
                name=c.name,
                num_embeddings=c.num_embeddings,
                embedding_dim=c.embedding_dim,
                feature_names=[c.name],
                pooling=PoolingType.SUM,
            )
            for c in self._configs
        ]
        super().__init__([[one] for one in ones], make)
        self.embeddings = self._named(plain.embeddings)

    def embedding_configs(self) -> list[Any]:
        """Return TorchRec's table configs."""
        return self._configs

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


def fuse(
    model: nn.Module, optimizer: str, lr: float, eps: float, device: torch.device
) -> list[tuple[str, FusedTables]]:
    """Replace every TorchRec collection of the model, in place; the logits of a selection stay as they are.

    Args:
        model: on CPU, freshly initialised.
        optimizer: a key of :data:`KINDS`.
        lr: learning rate.
        eps: of the optimiser.
        device: where the tables shall live.

    Returns:
        The operators, each with the path of its collection in the model.
    """

    def make(configs: list[Any]) -> FusedTables:
        return FusedTables(configs, optimizer, lr, eps, device)

    found = []
    for path, module in list(model.named_modules()):
        kinds: dict[type, Any] = {EmbeddingBagCollection: FusedBags, EmbeddingCollection: FusedSequences}
        kind = kinds.get(type(module))
        if kind is not None and not path.startswith(SELECTION):
            parent, _, name = path.rpartition(".")
            fused = kind(module, make)
            setattr(model.get_submodule(parent), name, fused)
            found += [(path, tables) for tables in fused.tables()]
    return found
