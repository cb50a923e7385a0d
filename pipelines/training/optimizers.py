"""Everything that moves weights: optimisers, regularisation, clipping, learning-rate plateau, stopping."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ctr_models.embeddings import FeatureEmbedding
from ctr_models.errors import ConfigError
from ctr_models.model import CTRModel
from pipelines.training.config import OptimizerConfig, PlateauConfig, StoppingConfig, TrainConfig

FUSED_LR = 0.02
SELECTION = "selection."
"""What the names of a selection's parameters begin with."""


def check_tables(config: TrainConfig, model: CTRModel, device: torch.device, world: int = 1) -> None:
    """Refuse what the embedding backend can't do, before any work.

    Raises:
        ConfigError: naming the key or the column, and the remedy.
    """
    table, where = config.embedding, "train.embedding"
    if table.backend == "dense":
        if table.optimizer == "rowwise_adagrad":
            raise ConfigError(
                "row-wise Adagrad exists for fused tables only",
                where=f"{where}.optimizer",
                remedy="use adam, adagrad or sgd, or train.embedding.backend=fused",
            )
        return
    if table.optimizer == "adam" and device.type == "cpu":
        raise ConfigError(
            "fused Adam needs a CUDA device",
            where=f"{where}.optimizer",
            remedy="use rowwise_adagrad, adagrad or sgd, or train.embedding.backend=dense",
        )
    if table.l2 and table.l2_mode == "whole_table":
        raise ConfigError(
            "fused tables don't decay rows outside the batch",
            where=f"{where}.l2_mode",
            remedy="use l2_mode=touched, or train.embedding.backend=dense",
        )
    if table.l2 and world > 1:
        raise ConfigError(
            "mini-batch aware L2 is for one process",
            where=f"{where}.l2",
            remedy="set it to 0, or train without torchrun",
        )
    for field in (*model.schema.sparse, *model.schema.sequences):
        if field.stored % 4:
            raise ConfigError(
                f"column {field.name!r} has dimension {field.stored}; fused tables need a multiple of 4",
                where=f"features.columns.{field.name}.dim",
                remedy=f"use {-(-field.stored // 4) * 4}, or train.embedding.backend=dense",
            )
    for name, weight in table_parameters(model).items():
        if weight.shape[1] % 4:
            raise ConfigError(
                f"the model's table {name.split('.')[-2]!r} has dimension {weight.shape[1]}; "
                "fused tables need a multiple of 4",
                where="model",
                remedy="set its dimension to a multiple of 4, or use train.embedding.backend=dense",
            )


def table_settings(config: TrainConfig) -> tuple[str, float, float]:
    """Return name, learning rate and eps of the tables' optimiser, defaults filled in."""
    table, main = config.embedding, config.optimizer
    if table.backend == "fused":
        return table.optimizer or "rowwise_adagrad", table.lr or FUSED_LR, table.eps
    return table.optimizer or main.name, table.lr or main.lr, table.eps if table.optimizer else main.eps


def table_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weights of the embedding tables by their name in the model; a selection's logits are none."""
    ids = {id(weight) for module in embeddings(model) for weight in module.table_parameters()}
    return {name: weight for name, weight in model.named_parameters() if id(weight) in ids}


def embeddings(model: nn.Module) -> list[FeatureEmbedding]:
    """Return the modules that embed features."""
    found = {path: module for path, module in model.named_modules() if isinstance(module, FeatureEmbedding)}
    return [module for path, module in found.items() if not path.startswith(SELECTION)]


def selection_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return what decides which feature values are kept, or what the model is, by name in the model."""
    own = getattr(model, "deciders", ())
    return {n: weight for n, weight in model.named_parameters() if n.startswith(SELECTION) or n in own}


def numeric_parameters(model: nn.Module) -> set[str]:
    """Return the names of the numeric fields' vectors, which are regularised as embeddings are."""
    ids = {id(vector) for module in embeddings(model) for vector in module.dense_parameters()}
    return {name for name, weight in model.named_parameters() if id(weight) in ids}


def torch_optimizer(name: str, groups: Iterable[Mapping[str, Any]], eps: float) -> torch.optim.Optimizer:
    """Make a torch optimiser over parameter groups that carry their own learning rates.

    torch's fused kernels make one pass over the memory where its loops make several.
    """
    groups = [dict(group) for group in groups]
    if name == "adam":
        return torch.optim.Adam(groups, eps=eps, fused=True)
    if name == "adagrad":
        on_cpu = all(p.device.type == "cpu" for group in groups for p in group["params"])
        return torch.optim.Adagrad(groups, eps=eps, fused=on_cpu or None)
    if name == "rowwise_adagrad":
        from torchrec.optim import RowWiseAdagrad

        return RowWiseAdagrad(groups, eps=eps)
    return torch.optim.SGD(groups, fused=True)


class Decay:
    """Adds the gradient of the regularisers, as a term of the loss would.

    Args:
        dense: weights of the layers; ``main.l2`` applies to those of two dimensions and more.
        tables: whole tables to which ``table_l2`` applies each step.
        main: the main optimiser's settings.
        table_l2: lambda of (lambda / 2) |W|^2 over the tables.
    """

    def __init__(
        self, dense: list[nn.Parameter], tables: list[nn.Parameter], main: OptimizerConfig, table_l2: float
    ) -> None:
        self._terms = [
            (main.l2, [p for p in dense if p.ndim >= 2]),
            (table_l2, tables),
        ]

    @torch.no_grad()
    def __call__(self) -> None:
        """Add lambda * W to every gradient."""
        for l2, weights in self._terms:
            own = [p for p in weights if p.grad is not None]
            if l2 and own:
                torch._foreach_add_([p.grad for p in own], own, alpha=l2)


class TouchedDecay:
    """Mini-batch aware L2: each row of the batch once, by lambda over the value's count in training.

    The gradient of (lambda / 2) sum_j I_j / n_j |w_j|^2, I_j = 1 when value j stands in the batch (equation 6 of
    arXiv 1706.06978).

    Args:
        model: unsharded; tells which fields read which table.
        counts: occurrences in training by id, for each of the schema's tables.
        l2: lambda.
    """

    def __init__(self, model: CTRModel, counts: Mapping[str, Any], l2: float, device: torch.device) -> None:
        self._l2 = l2
        fields: dict[str, list[str]] = {}
        for field in (*model.schema.sparse, *model.schema.sequences):
            fields.setdefault(field.table, []).append(field.name)
        self._fields = fields
        self._counts = {
            table: torch.as_tensor(counts[table], dtype=torch.float32, device=device).clamp_min(1.0)
            for table in fields
        }
        self._weights: list[tuple[str, nn.Parameter]] = []
        for module in embeddings(model):
            self._weights += module.tables().items()

    @torch.no_grad()
    def rows(self, batch: Any) -> list[tuple[nn.Parameter, Tensor, Tensor]]:
        """Return for each table its weight, the batch's distinct ids, and their lambda * w / n, (ids, dim)."""
        jagged = {**batch.sparse.to_dict(), **batch.sequences.to_dict()}
        distinct = {
            table: torch.cat([jagged[name].values() for name in names]).unique().long()
            for table, names in self._fields.items()
        }
        found = []
        for table, weight in self._weights:
            ids = distinct[table]
            found.append((weight, ids, weight[ids] * (self._l2 / self._counts[table][ids])[:, None]))
        return found


def clip(parameters: list[nn.Parameter], limit: float) -> None:
    """Scale the gradients so that their common norm is at most ``limit``, without waiting for the device."""
    torch.nn.utils.clip_grad_norm_(parameters, limit, foreach=True)


@dataclass
class Progress:
    """How far a run has come; what a checkpoint keeps beside the tensors."""

    epoch: int = 0
    step: int = 0
    """Steps done in this epoch."""
    rows: int = 0
    """Rows trained on in all."""
    seconds: float = 0.0
    """Seconds spent in training steps."""
    loss: float = 0.0
    """Sum of the epoch's losses so far."""
    best: float | None = None
    """Best value of the monitored metric, larger is better."""
    best_epoch: int = -1
    misses: int = 0
    """Evaluations without improvement, in a row."""
    plateau_misses: int = 0
    lr_scale: float = 1.0
    done: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def judge(
    progress: Progress,
    value: float,
    stopping: StoppingConfig | None,
    plateau: PlateauConfig | None,
    lr: float,
) -> bool:
    """Take one evaluation into account: best so far, learning rate, stopping.

    Args:
        progress: changed in place.
        value: the monitored metric, larger is better.
        stopping: when to stop; None never stops.
        plateau: when to lower the learning rate; None never does.
        lr: the main learning rate at the start of the run; its floor is ``plateau.min_lr``.

    Returns:
        Whether this evaluation is the best so far.
    """
    min_delta = stopping.min_delta if stopping else 0.0
    better = progress.best is None or value > progress.best + min_delta
    if better:
        progress.best, progress.best_epoch = value, progress.epoch
        progress.misses = progress.plateau_misses = 0
        return True
    progress.misses += 1
    progress.plateau_misses += 1
    if plateau is not None and progress.plateau_misses >= plateau.patience:
        progress.lr_scale = max(progress.lr_scale * plateau.factor, min(1.0, plateau.min_lr / lr))
        progress.plateau_misses = 0
    if stopping is not None and progress.misses >= stopping.patience:
        progress.done = True
    return False
