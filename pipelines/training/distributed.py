"""Several processes under torchrun: who is who, how tables are spread, and statistics over all rows of a step."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ctr_models.errors import ConfigError, nearest
from ctr_models.layers.task_loss import TaskLoss
from ctr_models.model import CTRModel
from pipelines.training.config import ShardingConfig, TrainConfig


@dataclass(frozen=True)
class Ranks:
    """This process among those of the job.

    Args:
        rank: of this process.
        world: number of processes.
        device: where this process computes.
    """

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process logs and writes."""
        return self.rank == 0

    def share(self, value: Any) -> Any:
        """Return rank 0's value on every rank."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def concatenate(self, rows: np.ndarray) -> np.ndarray:
        """Return every rank's rows, one rank after the other, on every rank."""
        if self.world == 1:
            return rows
        boxes: list[Any] = [None] * self.world
        dist.all_gather_object(boxes, rows)
        return np.concatenate(boxes)

    def wait(self) -> None:
        """Wait for all ranks."""
        if self.world > 1:
            dist.barrier()


@contextmanager
def ranks() -> Iterator[Ranks]:
    """Join the job that torchrun describes, or be alone; leave it at the end.

    Example:
        >>> with ranks() as me:
        ...     me.world
        1
    """
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    joined = world > 1 and not dist.is_initialized()
    if joined:
        # Others wait while rank 0 encodes the features, which may take hours; torchrun ends them if it fails.
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=6))
    try:
        yield Ranks(rank, world, device)
    finally:
        if joined:
            dist.destroy_process_group()


def shard(model: nn.Module, schema_model: CTRModel, config: TrainConfig, me: Ranks) -> nn.Module:
    """Spread the model's tables over the ranks and copy the rest to each.

    Args:
        model: the module to wrap, with the same initial weights on every rank; its tables' in-backward optimisers
            are attached.
        schema_model: the CTRModel inside, for messages.
        config: names the kind of sharding.
        me: this process.

    Returns:
        TorchRec's DistributedModelParallel.

    Raises:
        ConfigError: a kind of sharding that a table does not allow, naming the table.
    """
    from torchrec.distributed import DistributedModelParallel, ShardingEnv
    from torchrec.distributed.types import ShardingPlan

    modules = sharded_modules(model)
    plans = {}
    if config.sharding.kind != "auto" or me.device.type == "cpu":
        generator = _Rules(config.sharding, me)
        for path, module in modules.items():
            plans[path] = generator.plan(module)
        plan: Any = ShardingPlan(plan=plans)
    else:
        plan = _planned(model, config, me)
    group = dist.group.WORLD
    assert group is not None
    initial = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    sharded = DistributedModelParallel(
        model, env=ShardingEnv.from_process_group(group), device=me.device, plan=plan
    )
    _copy_into(sharded.state_dict(), initial)  # sharding draws the tables anew, other numbers on every rank
    return sharded


@torch.no_grad()
def _copy_into(state: dict[str, Any], initial: dict[str, Tensor]) -> None:
    """Give each rank its piece of the unsharded weights."""
    for name, tensor in state.items():
        whole = initial[name]
        if not hasattr(tensor, "local_shards"):
            tensor.copy_(whole)
            continue
        for piece in tensor.local_shards():
            where = zip(piece.metadata.shard_offsets, piece.metadata.shard_sizes, strict=True)
            piece.tensor.copy_(whole[tuple(slice(start, start + size) for start, size in where)])


def sharded_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return TorchRec's collections inside the model by path."""
    from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

    return {p: m for p, m in model.named_modules() if type(m) in (EmbeddingBagCollection, EmbeddingCollection)}


def replicated_tables(model: nn.Module, sharding: ShardingConfig, device: torch.device) -> set[str]:
    """Return the names of the tables that every rank holds whole."""
    kind = _default(sharding, device)
    return {
        config.name
        for module in sharded_modules(model).values()
        for config in _configs(module)
        if sharding.tables.get(config.name, kind) == "data_parallel"
    }


def check_sharding(model: nn.Module, config: TrainConfig, me: Ranks) -> None:
    """Refuse a sharding that a table does not allow, and what ranks can't do together.

    Raises:
        ConfigError: naming the key and the remedy.
    """
    from torchrec.modules.embedding_modules import EmbeddingCollection

    if config.averaging:
        raise ConfigError(
            "weights are averaged in one process only",
            where="train.averaging",
            remedy="set it to null, or train without torchrun",
        )
    if any(name.startswith("selection.") for name, _ in model.named_parameters()):
        raise ConfigError(
            "values are selected in one process only: the penalty is on whole tables",
            where="model.gates.selection",
            remedy="train without torchrun",
        )
    sharding = config.sharding
    modules = sharded_modules(model).values()
    names = {c.name for module in modules for c in _configs(module)}
    for name in sharding.tables:
        if name not in names:
            raise ConfigError(
                f"no table {name!r}", where="train.sharding.tables", remedy=nearest(name, names) if names else ""
            )
    default = _default(sharding, me.device)
    for module in modules:
        for table in _configs(module):
            kind = sharding.tables.get(table.name, default)
            where = (
                f"train.sharding.tables.{table.name}" if table.name in sharding.tables else "train.sharding.kind"
            )
            if kind == "data_parallel" and isinstance(module, EmbeddingCollection):
                raise ConfigError(
                    f"table {table.name!r} belongs to a sequence and can't be data_parallel",
                    where=where,
                    remedy=f"set train.sharding.tables.{table.name}=row_wise",
                )
            if config.embedding.backend == "dense" and kind != "data_parallel":
                raise ConfigError(
                    f"the dense backend keeps table {table.name!r} whole on every rank",
                    where=where,
                    remedy="use train.sharding.kind=data_parallel, or train.embedding.backend=fused",
                )
            if kind == "column_wise" and config.embedding.backend == "fused" and _row_wise(config):
                raise ConfigError(
                    "row-wise Adagrad needs whole rows; shards of columns would each keep a mean of their own",
                    where=where,
                    remedy="set train.embedding.optimizer=adagrad, or use row_wise or table_wise",
                )
            if kind == "column_wise" and table.embedding_dim % (4 * me.world):
                raise ConfigError(
                    f"table {table.name!r} of dimension {table.embedding_dim} can't be cut into {me.world} shards "
                    "of columns, each a multiple of 4",
                    where=where,
                    remedy=f"use a dimension that {4 * me.world} divides, or row_wise",
                )


def _row_wise(config: TrainConfig) -> bool:
    return config.embedding.optimizer in (None, "rowwise_adagrad")


def _default(sharding: ShardingConfig, device: torch.device) -> str:
    if sharding.kind == "auto":
        return "row_wise" if device.type == "cpu" else "auto"
    return sharding.kind


def _configs(module: Any) -> list[Any]:
    return (
        module.embedding_bag_configs() if hasattr(module, "embedding_bag_configs") else module.embedding_configs()
    )


class _Rules:
    """A plan by rule: whole tables go to the ranks in turn, the largest first."""

    def __init__(self, sharding: ShardingConfig, me: Ranks) -> None:
        self._sharding, self._me = sharding, me
        self._load = [0] * me.world

    def plan(self, module: nn.Module) -> Any:
        """Return the plan of one collection."""
        from torchrec.distributed.sharding_plan import (
            column_wise,
            construct_module_sharding_plan,
            data_parallel,
            row_wise,
            table_wise,
        )

        default = _default(self._sharding, self._me.device)
        rules: dict[str, Any] = {}
        for table in sorted(_configs(module), key=lambda c: -c.num_embeddings * c.embedding_dim):
            kind = self._sharding.tables.get(table.name, default)
            if kind == "table_wise":
                rank = self._load.index(min(self._load))
                self._load[rank] += table.num_embeddings * table.embedding_dim
                rules[table.name] = table_wise(rank=rank)
            elif kind == "column_wise":
                rules[table.name] = column_wise(ranks=list(range(self._me.world)))
            elif kind == "data_parallel":
                rules[table.name] = data_parallel()
            else:
                rules[table.name] = row_wise()
        order = [c.name for c in _configs(module)]
        local = int(os.environ.get("LOCAL_WORLD_SIZE", self._me.world))
        return construct_module_sharding_plan(
            module,
            {name: rules[name] for name in order},
            local_size=local,
            world_size=self._me.world,
            device_type=self._me.device.type,
        )


def _planned(model: nn.Module, config: TrainConfig, me: Ranks) -> Any:
    """TorchRec's own plan for GPUs of known memory, the exceptions held fixed."""
    from torchrec.distributed.model_parallel import get_default_sharders
    from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
    from torchrec.distributed.planner.types import ParameterConstraints

    kinds = ["row_wise", "table_wise"] if _row_wise(config) else ["row_wise", "table_wise", "column_wise"]
    tables = [table.name for module in sharded_modules(model).values() for table in _configs(module)]
    planner = EmbeddingShardingPlanner(
        topology=Topology(
            world_size=me.world,
            local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", me.world)),
            compute_device="cuda",
            hbm_cap=int(config.sharding.hbm_gb * 1024**3),
        ),
        constraints={
            name: ParameterConstraints(
                sharding_types=[config.sharding.tables[name]] if name in config.sharding.tables else kinds
            )
            for name in tables
        },
    )
    group = dist.group.WORLD
    assert group is not None
    return planner.collective_plan(model, get_default_sharders(), group)


class _Sum(torch.autograd.Function):
    """Sum over ranks, in both directions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        grad = grads[0].clone()
        dist.all_reduce(grad)
        return grad


class RankBatchNorm(nn.BatchNorm1d):
    """Batch normalisation over the rows of all ranks, on any device; every rank must have as many rows.

    torch's SyncBatchNorm does this for CUDA only.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (B, C) rows."""
        if not self.training:
            return super().forward(input)
        world = dist.get_world_size()
        x = input.float()
        mean = _Sum.apply(x.mean(0)) / world
        variance = _Sum.apply((x - mean).square().mean(0)) / world
        with torch.no_grad():
            rows = x.shape[0] * world
            momentum = self.momentum if self.momentum is not None else 0.1
            if self.running_mean is not None and self.running_var is not None:
                self.running_mean.lerp_(mean, momentum)
                self.running_var.lerp_(variance * (rows / max(rows - 1, 1)), momentum)
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
        y = (x - mean) * (variance + self.eps).rsqrt()
        if self.affine:
            y = y * self.weight + self.bias
        return y.to(input.dtype)


class RankTaskLoss(TaskLoss):
    """The loss of further tasks by the mean over the known labels of all ranks, who know of unequally many."""

    def rows(self, known: Tensor) -> Tensor:
        """Return how many rows of each task are known to a rank on average, (T,): gradients are averaged, too."""
        rows = super().rows(known)
        dist.all_reduce(rows)
        return rows / dist.get_world_size()


def join_statistics(model: nn.Module) -> None:
    """Make every BatchNorm1d of the model take its statistics over all ranks, and every TaskLoss its mean."""
    for module in model.modules():
        if type(module) is nn.BatchNorm1d:
            module.__class__ = RankBatchNorm
        elif type(module) is TaskLoss:
            module.__class__ = RankTaskLoss
