"""MMoE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from ctr_models.batch import Batch
from ctr_models.errors import ConfigError, nearest
from ctr_models.gates.base import GateShape, GateSpec
from ctr_models.layers.experts import Experts, mix
from ctr_models.layers.gated_embedding import GatedEmbedding
from ctr_models.layers.mlp import MLP, MLPConfig
from ctr_models.layers.task_loss import TaskLoss
from ctr_models.model import CTRModel, ModelConfig, register_model
from ctr_models.schema import Schema


class MMoEConfig(ModelConfig):
    """Settings of ``mmoe``."""

    experts: int = Field(4, ge=2)
    expert: MLPConfig = MLPConfig(hidden=(200, 80))
    tower: MLPConfig = MLPConfig(hidden=(40,))
    """The perceptron of each task, on what its gate makes of the experts."""
    task_weights: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)
    """Of each further task's loss, by its name, beside the click's, which counts 1; a task not named counts 1."""


@register_model("mmoe")
class MMoE(CTRModel):
    """logit_t = tower_t(sum_k g_tk(x) f_k(x)): the tasks share K experts, and each has a gate of its own.

    Tasks are the click and those of ``features.tasks``. Slot ``expert`` gives each task's weights g_t from the
    row x; one gate a task is built, all of one kind. The loss is the click's cross-entropy plus that of each other
    task, times its weight, over the rows where its label is known. :meth:`forward` computes the click alone, as it
    is served. Data with one label make this a plain mixture of experts.

    Raises:
        ConfigError: ``task_weights`` names no task of the features.

    Example:
        >>> from ctr_models import create_model, example_batch
        >>> schema = Schema.of({"user": 10, "item": 20}, tasks=["conversion"])
        >>> model, batch = create_model("mmoe", schema, experts=3), example_batch(schema, rows=5)
        >>> model(batch).shape, model.task_logits(batch).shape
        (torch.Size([5]), torch.Size([5, 2]))

    Source: KDD 2018, doi 10.1145/3219819.3220007.
    """

    Config = MMoEConfig
    config: MMoEConfig
    default_gates: ClassVar[Mapping[str, str]] = {"expert": "softmax", "field": "none", "feature": "none"}
    source = "doi 10.1145/3219819.3220007"

    def __init__(self, config: MMoEConfig, schema: Schema, gates: Mapping[str, GateSpec]) -> None:
        super().__init__(config, schema, gates)
        for name in config.task_weights:
            if name not in schema.tasks:
                raise ConfigError(
                    f"the features have no task {name!r}",
                    where=f"model.task_weights.{name}",
                    remedy=nearest(name, schema.tasks) if schema.tasks else "name its column in features.tasks",
                )
        self.inputs = GatedEmbedding(schema, gates, std=config.embedding_std)
        width, tasks = self.inputs.width, 1 + len(schema.tasks)
        self.experts = Experts(width, config.expert, experts=config.experts)
        shape = GateShape(slot="expert", width=width, choices=config.experts)
        self.task_gates = nn.ModuleList(gates["expert"].build(shape) for _ in range(tasks))
        self.towers = nn.ModuleList(MLP(self.experts.width, config.tower, outputs=1) for _ in range(tasks))
        self.task_loss = TaskLoss([config.task_weights.get(name, 1.0) for name in schema.tasks])

    @property
    def tasks(self) -> tuple[str, ...]:
        """The further tasks: those of the features."""
        return self.schema.tasks

    def forward(self, batch: Batch) -> Tensor:
        """Return the logits of the click, (B,)."""
        return self._logits(batch, 1).squeeze(1)

    def task_logits(self, batch: Batch) -> Tensor:
        """Return the logits of the click and of each further task, (B, 1 + T)."""
        return self._logits(batch, len(self.towers))

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the loss over all tasks with the penalties, a scalar, and the logits of the click, (B,)."""
        logits = self.task_logits(batch)
        loss = self.loss_of(logits[:, 0], batch)
        if self.tasks and batch.targets is not None:
            loss = loss + self.task_loss(logits[:, 1:], batch.targets)
        return loss, logits[:, 0]

    def _logits(self, batch: Batch, tasks: int) -> Tensor:
        """The logits of the first tasks, (B, tasks)."""
        (x,) = self.inputs(batch)  # (B, D)
        said = self.experts.each(x)  # (B, K, H)
        gates, towers = list(self.task_gates)[:tasks], list(self.towers)[:tasks]
        return torch.cat([tower(mix(said, gate(x))) for gate, tower in zip(gates, towers, strict=True)], dim=1)
