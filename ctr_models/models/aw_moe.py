"""AW-MoE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ctr_models.batch import Batch
from ctr_models.errors import ConfigError, nearest
from ctr_models.gates.base import Gate, GateShape, GateSpec
from ctr_models.layers.contrast import contrastive_loss, hard_shares, masked_view, spread
from ctr_models.layers.experts import Experts
from ctr_models.layers.gated_embedding import GatedEmbedding
from ctr_models.layers.interest import Interest, targets_of
from ctr_models.layers.mlp import MLPConfig
from ctr_models.layers.target_attention import TargetAttentionConfig
from ctr_models.layers.teacher import Teacher
from ctr_models.model import CTRModel, ModelConfig, register_model
from ctr_models.schema import Schema


class ContrastConfig(BaseModel):
    """The loss on the gate's output for two thinned views of each history, in training."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    weight: float = Field(0.01, ge=0)
    """Of this loss beside the cross-entropy; 0 leaves it out."""
    temperature: float = Field(0.1, gt=0)
    """The lower, the harder the most similar rows of other users are pushed apart."""
    mask: float = Field(0.3, ge=0, lt=1)
    """Probability that a view leaves a behaviour out; one always stays."""
    masking: Literal["random", "hard"] = "random"
    """``hard``: of the behaviours that count most for the gate's averaged weights, about as many as at random."""
    teacher_decay: float = Field(0.99, ge=0, lt=1)
    """Of that average, for ``hard``; it looks back over about 1 / (1 - decay) steps."""
    rows: int = Field(1024, ge=2)
    """Rows of a batch, the first, that are told apart from one another; the cost grows with their square."""


class AWMoEConfig(ModelConfig):
    """Settings of ``aw_moe``."""

    attention: TargetAttentionConfig = TargetAttentionConfig()
    experts: int = Field(4, ge=2)
    expert: MLPConfig = MLPConfig(hidden=(200, 80))
    history: str | None = None
    """The history that decides on the experts; None: the first that has a target."""
    contrast: ContrastConfig = ContrastConfig()


class _History(NamedTuple):
    values: Tensor  # (T, d)
    offsets: Tensor  # (B + 1,)
    query: Tensor  # (B, d)


@register_model("aw_moe")
class AWMoE(CTRModel):
    """logit = sum_k g_k s_k(x), x = [e, v]: K experts, weighed by what the user did.

    The experts are perceptrons on all fields e and DIN's interests v. Slot ``expert`` gives the weights g from the
    behaviours of one history and the candidate; any gate of the slot may stand there. In training, two views of
    the history are drawn by leaving behaviours out, and a contrastive loss asks that the gate's outputs on both
    be alike, and unlike those of other users (see :func:`ctr_models.layers.contrast.contrastive_loss`): users with
    few behaviours shall be treated as they would be with more. Only the gate sees the views, and rows without
    behaviours have none. A gate that does not look at behaviours is trained without this loss. Without histories
    the gate weighs by x. With ``masking: hard`` the views leave out what counts most for the gate with its averaged
    weights (see :func:`ctr_models.layers.contrast.hard_shares`).

    The paper's abstract alone is public. That the gate sums over behaviours, that the loss is on its output and
    that behaviours are masked at random is from there; the form of the experts, one score each, and of the loss
    is our reading, and so are all defaults.

    Raises:
        ConfigError: there are histories, but none has a target; ``history`` names none that has one; the masking
            is hard, and the gate has no attention.

    Example:
        >>> from ctr_models import IdField, create_model, example_batch
        >>> item = IdField(name="item", rows=20)
        >>> clicks = IdField(name="clicks", rows=20, table="item", kind="sequence", target="item", max_length=9)
        >>> schema = Schema(sparse=(item,), sequences=(clicks,))
        >>> create_model("aw_moe", schema, experts=3)(example_batch(schema, rows=3)).shape
        torch.Size([3])

    Source: arXiv 2306.05011.
    """

    Config = AWMoEConfig
    config: AWMoEConfig
    default_gates: ClassVar[Mapping[str, str]] = {
        "expert": "attention_weighted",
        "sequence": "none",
        "field": "none",
        "feature": "none",
    }
    source = "arXiv 2306.05011"

    def __init__(self, config: AWMoEConfig, schema: Schema, gates: Mapping[str, GateSpec]) -> None:
        super().__init__(config, schema, gates)
        self.inputs = GatedEmbedding(schema, gates, std=config.embedding_std)
        self.interest = Interest(schema, config.attention, gates["sequence"])
        targets = targets_of(schema)
        self.history = config.history or next(iter(targets), None)
        if self.history is not None and self.history not in targets:
            raise ConfigError(
                f"no history {self.history!r} with a target",
                where="model.history",
                remedy=nearest(self.history, targets),
            )
        self.target = "" if self.history is None else targets[self.history]
        dim = next((f.dim for f in schema.sequences if f.name == self.history), 0)
        width = self.inputs.width
        self.gate = gates["expert"].build(
            GateShape(slot="expert", width=width, context=dim, choices=config.experts)
        )
        self.experts = Experts(width, config.expert, experts=config.experts, outputs=1)
        self.teacher = None
        if config.contrast.masking == "hard" and self._contrasts:
            if not hasattr(self.gate, "attention"):
                raise ConfigError(
                    f"gate {gates['expert'].name!r} does not say how much each behaviour counts",
                    where="model.contrast.masking",
                    remedy="set it to random, or model.gates.expert to attention_weighted",
                )
            self.teacher = Teacher(self.gate, config.contrast.teacher_decay)

    def forward(self, batch: Batch) -> Tensor:
        """Return logits, (B,)."""
        return self._logits(*self._inputs(batch))

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the loss (cross-entropy, penalties and, in training, the contrastive loss) and the logits (B,)."""
        x, history = self._inputs(batch)
        logits = self._logits(x, history)
        loss = self.loss_of(logits, batch)
        if self.training and self._contrasts:
            assert history is not None
            if self.teacher is not None:
                self.teacher.update(self.gate)
            one, other, user = self._views(x, history, batch.group)
            own = self.config.contrast
            loss = loss + own.weight * contrastive_loss(one, other, user, temperature=own.temperature)
        return loss, logits

    @torch.no_grad()
    def telemetry(self, batch: Batch) -> dict[str, dict[str, float]]:
        """Describe what each gate does, and how the outputs of the gate that weighs the experts are spread."""
        told = super().telemetry(batch)
        if self.history is not None and self._by_behaviours:
            was_training = self.training
            self.eval()
            x, history = self._inputs(batch)
            assert history is not None
            generator = torch.Generator(x.device).manual_seed(0)  # training's random numbers stay as they are
            whole, there = self._first(x, history)
            told["gate"] |= spread(
                self.gate.mixture(*whole)[there], *self._views(x, history, batch.group, generator)
            )
            self.train(was_training)
        return told

    @property
    def _by_behaviours(self) -> bool:
        return type(self.gate).mixture is not Gate.mixture

    @property
    def _contrasts(self) -> bool:
        return self.config.contrast.weight > 0 and self.history is not None and self._by_behaviours

    @torch.no_grad()
    def expert_weights(self, batch: Batch) -> Tensor:
        """Return how much each expert counts in each row, in evaluation mode, (B, K).

        Example:
            >>> from ctr_models import Schema, create_model, example_batch
            >>> schema = Schema.of({"user": 10, "item": 20})
            >>> model = create_model("aw_moe", schema, experts=2, gates={"expert": "none"})
            >>> model.expert_weights(example_batch(schema, rows=1))
            tensor([[0.5000, 0.5000]])
        """
        was_training = self.training
        try:
            return self._weights(*self.eval()._inputs(batch))
        finally:
            self.train(was_training)

    def _inputs(self, batch: Batch) -> tuple[Tensor, _History | None]:
        embedded = self.interest(self.inputs.embed(batch))
        (x,) = self.inputs.gated(batch, embedded)  # (B, D)
        if self.history is None:
            return x, None
        behaviours = embedded.sequences[self.history]
        return x, _History(behaviours.values(), behaviours.offsets(), embedded.field(self.target))

    def _logits(self, x: Tensor, history: _History | None) -> Tensor:
        return self.experts(x, self._weights(x, history)).squeeze(1)

    def _weights(self, x: Tensor, history: _History | None) -> Tensor:
        return self.gate(x) if history is None else self.gate.mixture(x, *history)  # (B, K)

    def _first(self, x: Tensor, history: _History) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """Return x and history of the first rows, and which of these have behaviours."""
        rows = self.config.contrast.rows
        offsets, query = history.offsets[: rows + 1], history.query[:rows]
        return (x[:rows], history.values[: int(offsets[-1])], offsets, query), offsets.diff() > 0

    def _views(
        self, x: Tensor, history: _History, user: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gate's output on two views of the first rows with behaviours, (R, K) each, and their users."""
        (x, values, offsets, query), there = self._first(x, history)
        share: float | Tensor = self.config.contrast.mask
        if self.teacher is not None:
            share = hard_shares(self.teacher(self.gate, values, offsets, query), offsets, self.config.contrast.mask)
        one, other = (
            self.gate.mixture(x, *masked_view(values, offsets, share, generator=generator), query)[there]
            for _ in range(2)
        )
        return one, other, user[: len(x)][there]
