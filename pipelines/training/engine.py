"""The model in training: one step forward, and everything that a checkpoint must hold of it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ctr_models.batch import Batch
from ctr_models.memory import keep_freed_memory
from ctr_models.model import CTRModel
from pipelines.training.averaging import WeightAverage
from pipelines.training.config import TrainConfig
from pipelines.training.cpu import speed_up
from pipelines.training.distributed import Ranks, check_sharding, join_statistics, replicated_tables, shard
from pipelines.training.optimizers import (
    Decay,
    TouchedDecay,
    check_tables,
    clip,
    numeric_parameters,
    selection_parameters,
    table_parameters,
    table_settings,
    torch_optimizer,
)


class _Loss(nn.Module):
    """Makes loss and logits the module's output, so that a parallel wrapper sees the whole computation.

    In evaluation it is the logits of all tasks alone.
    """

    def __init__(self, model: CTRModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor] | Tensor:
        return self.model.loss(batch) if self.training else self.model.task_logits(batch)


class Engine:
    """A model, its optimisers and how they step, on one process or many.

    Args:
        model: freshly initialised on CPU, with equal weights on every rank; taken over and changed.
        config: optimisers, backend, sharding, precision.
        me: this process.
        counts: occurrences in training by id, by table; needed for mini-batch aware L2 only.

    Raises:
        ConfigError: the backend or the sharding can't do what is asked.
    """

    def __init__(
        self, model: CTRModel, config: TrainConfig, me: Ranks, counts: Mapping[str, Any] | None = None
    ) -> None:
        self.config, self.me, self.device = config, me, me.device
        check_tables(config, model, me.device, me.world)
        name, table_lr, eps = table_settings(config)
        self._fused_lr = table_lr
        fused = config.embedding.backend == "fused"
        self._operators: list[Any] = []
        self._table_optimizer: Any = None
        numeric = numeric_parameters(model)
        tables = table_parameters(model)
        own_tables: dict[str, nn.Parameter] = {} if fused else tables

        if me.world > 1:
            check_sharding(model, config, me)
            whole = replicated_tables(model, config.sharding, me.device)
            join_statistics(model)
            if fused:
                self._attach(tables, whole, name, table_lr, eps)
        elif fused:
            from pipelines.training.fused import fuse

            self._operators = fuse(model, name, table_lr, eps, me.device)
        if me.device.type == "cpu":
            keep_freed_memory()
            speed_up(model)
        self.model = model
        self.module: nn.Module = _Loss(model).to(me.device)
        if me.world > 1:
            self.module = shard(self.module, model, config, me)
            if fused:
                self._table_optimizer = self.module.fused_optimizer
            own_tables = self._replicated()
        touched = config.embedding.l2 > 0 and config.embedding.l2_mode == "touched"
        self._touched = TouchedDecay(model, counts or {}, config.embedding.l2, me.device) if touched else None

        named = self._ordinary()
        tables_here = {n: p for n, p in named.items() if n in {f"model.{t}" for t in own_tables}}
        chosen_by = {n: p for n, p in named.items() if n in {f"model.{s}" for s in selection_parameters(model)}}
        dense = {n: p for n, p in named.items() if n not in tables_here and n not in chosen_by}
        main = config.optimizer
        self._optimizers: list[tuple[torch.optim.Optimizer, list[float]]] = []
        self._names = {id(p): n for n, p in named.items()}
        groups = [{"params": list(dense.values()), "lr": main.lr}]
        if tables_here and (name, eps) == (main.name, main.eps):
            groups.append({"params": list(tables_here.values()), "lr": table_lr})
        self._add(main.name, groups, main.eps)
        if tables_here and len(groups) == 1:
            self._add(name, [{"params": list(tables_here.values()), "lr": table_lr}], eps)
        # As in OptFS, the logits of a selection have an Adam of their own; they don't decay, and aren't clipped.
        self._add("adam", [{"params": list(chosen_by.values()), "lr": config.selection_lr or main.lr}], main.eps)
        clipped = dense if fused else {**dense, **tables_here}
        self._clipped = list(clipped.values())
        whole_l2 = config.embedding.l2 if not touched else 0.0
        vectors = [p for n, p in dense.items() if n.removeprefix("model.") in numeric]
        layers = [p for n, p in dense.items() if n.removeprefix("model.") not in numeric]
        self._decay = Decay(layers, [*tables_here.values(), *vectors], main, whole_l2)
        self._average = WeightAverage(model, config.averaging.decay) if config.averaging else None
        self._autocast = config.precision == "bfloat16" and _has_bfloat16(me.device)

    def _attach(self, tables: dict[str, nn.Parameter], whole: set[str], name: str, lr: float, eps: float) -> None:
        """Give sharded tables their in-backward optimiser; a replicated table would silently never move."""
        from torch.distributed.optim import _apply_optimizer_in_backward
        from torchrec.optim import RowWiseAdagrad

        kinds = {
            "sgd": torch.optim.SGD,
            "adagrad": torch.optim.Adagrad,
            "rowwise_adagrad": RowWiseAdagrad,
            "adam": torch.optim.Adam,
        }
        arguments = {"lr": lr} if name == "sgd" else {"lr": lr, "eps": eps}
        sharded = [p for path, p in tables.items() if path.split(".")[-2] not in whole]
        if sharded:
            _apply_optimizer_in_backward(kinds[name], sharded, arguments)

    def _replicated(self) -> dict[str, nn.Parameter]:
        """Tables that an ordinary optimiser must move, by name."""
        markers = (".embedding_bags.", ".embeddings.")
        return {
            n.removeprefix("model."): p
            for n, p in self._ordinary().items()
            if any(marker in n for marker in markers) and n.endswith(".weight")
        }

    def _ordinary(self) -> dict[str, nn.Parameter]:
        """Parameters that have a gradient of their own, by name."""
        from torchrec.optim.optimizers import in_backward_optimizer_filter

        return {n: p for n, p in in_backward_optimizer_filter(self.module.named_parameters()) if p.requires_grad}

    def _add(self, name: str, groups: list[dict[str, Any]], eps: float) -> None:
        groups = [g for g in groups if g["params"]]
        if groups:
            optimizer = torch_optimizer(name, groups, eps)
            self._optimizers.append((optimizer, [g["lr"] for g in optimizer.param_groups]))

    def step(self, batch: Batch) -> Tensor:
        """Move the weights by one batch.

        Args:
            batch: on the engine's device.

        Returns:
            The loss before the step, a detached scalar on the device.
        """
        rows = self._touched.rows(batch) if self._touched else []
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self._autocast):
            loss, _ = self.module(batch)
        loss.backward()
        if self._touched and not self._operators:
            for weight, ids, gradient in rows:
                assert weight.grad is not None
                weight.grad.index_add_(0, ids, gradient)
        self._decay()
        if self.config.clip_norm is not None:
            clip(self._clipped, self.config.clip_norm)
        for optimizer, _ in self._optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if self._operators:
            with torch.no_grad():
                for weight, ids, gradient in rows:
                    weight.index_add_(0, ids, gradient, alpha=-self._fused_lr * self._scale)
        if self._average:
            self._average.update()
        return loss.detach()

    _scale = 1.0

    def scale_lr(self, scale: float) -> None:
        """Set every learning rate to ``scale`` times its start."""
        self._scale = scale
        for optimizer, rates in self._optimizers:
            for group, lr in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = lr * scale
        for _, tables in self._operators:
            tables.operator.set_learning_rate(self._fused_lr * scale)
        if self._table_optimizer is not None:
            for group in self._table_optimizer.param_groups:
                group["lr"] = self._fused_lr * scale
            self._table_optimizer.step()  # hands the rate on to the operators

    @torch.no_grad()
    def logits(self, batch: Batch) -> Tensor:
        """Return the logits of the click and of each further task in evaluation mode, (B, 1 + T) float32."""
        self.module.eval()
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self._autocast):
            return self.module(batch).float()

    def averaged(self) -> AbstractContextManager[None]:
        """Let the model carry the weights to be evaluated and kept: their average, where one is asked for."""
        return self._average.in_place() if self._average else nullcontext()

    def train(self) -> None:
        """Switch to training mode."""
        self.module.train()

    def weights(self) -> dict[str, Any]:
        """Return the model's state by name; sharded tables as ShardedTensors. They alias the model."""
        return {n.removeprefix("model."): t for n, t in self.module.state_dict().items()}

    def state(self) -> dict[str, Any]:
        """Return weights and optimiser state in one flat mapping; the tensors alias what they describe."""
        found = {f"model/{n}": t for n, t in self.weights().items()}
        if self._average:
            found.update({f"average/{n}": t for n, t in self._average.state().items()})
        for path, tables in self._operators:
            found.update({f"tables/{path}.{n}": t for n, t in tables.state().items()})
        if self._table_optimizer is not None:
            for name, values in self._table_optimizer.state_dict()["state"].items():
                path = name.removeprefix("model.").removesuffix(".weight")
                path = path.replace(".embedding_bags.", ".").replace(".embeddings.", ".")
                for number, (_, tensor) in enumerate(sorted(values.items())):
                    found[f"tables/{path}.{number}"] = tensor  # the name that one process gives it
        for optimizer, _ in self._optimizers:
            for parameter, values in optimizer.state.items():
                name = self._names[id(parameter)]
                found.update({f"optimizer/{name}/{k}": v for k, v in values.items() if isinstance(v, Tensor)})
        return found

    def prepare_state(self) -> None:
        """Make the optimisers' empty state, so that a checkpoint can be loaded into :meth:`state`."""
        for optimizer, rates in self._optimizers:
            if optimizer.state:
                continue
            for group in optimizer.param_groups:
                group["lr"] = 0.0
                for parameter in group["params"]:
                    parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            for group, lr in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = lr

    def restored(self, steps: int) -> None:
        """Tell the tables' operators how many steps they have made; their Adam needs it."""
        for _, tables in self._operators:
            tables.operator.set_optimizer_step(steps)


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        has = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if not has:
        warnings.warn("this device has no bfloat16; training in float32", stacklevel=2)
    return has
