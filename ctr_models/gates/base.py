"""The gate: a part that decides how much of something passes, swapped by name."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from ctr_models.errors import ConfigError, explain
from ctr_models.registry import Registry
from kernels.jagged_pool import jagged_pool

Slot = Literal[
    "feature", "field", "selection", "cross", "attention", "sequence", "expert", "fusion", "depth", "interaction"
]
SLOTS: tuple[str, ...] = Slot.__args__  # type: ignore[attr-defined]


class GateConfig(BaseModel):
    """Settings that every gate has; a gate's own config derives from it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    start: Literal["paper", "identity"] = "paper"
    """``identity``: the mask is exactly 1 before training, so that a challenger begins as the control."""


@dataclass(frozen=True, kw_only=True)
class GateShape:
    """The sizes a slot offers to its gate.

    Args:
        slot: where the gate stands.
        width: last dimension of ``x``.
        context: last dimension of ``context``; 0 when the slot has none.
        fields: number of fields F, for slots that see (B, F, D).
        choices: number of experts K in slot expert, of ways to treat a pair in slot interaction.
        heads: attention heads H in slot attention.
        depth: which of the layers, counted from 0, for gates of a stack.
    """

    slot: Slot
    width: int
    context: int = 0
    fields: int = 0
    choices: int = 0
    heads: int = 0
    depth: int = 0


class GateSpec(BaseModel):
    """A gate by name and settings. Its hash is the tag of the run, the arm's id and the key of the event log.

    Example:
        >>> GateSpec.parse("sigmoid2").hash == GateSpec(name="sigmoid2").hash
        True
        >>> GateSpec.parse({"name": "sigmoid2", "hidden": [64]}).options
        {'hidden': [64]}
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    options: dict[str, Any] = Field(default_factory=dict)

    @classmethod
    def parse(cls, value: str | dict[str, Any] | GateSpec) -> GateSpec:
        """Read ``name`` or ``{name: ..., option: ...}`` and check the options against the gate's config."""
        if isinstance(value, GateSpec):
            return value
        if not isinstance(value, str | dict):
            raise ConfigError(
                f"expected a gate's name or keys, got {value!r}",
                remedy="write none for no gate; YAML reads no and off as false",
            )
        value = {"name": value} if isinstance(value, str) else dict(value)
        if "name" not in value:
            raise ConfigError("a gate needs a name", remedy="write {name: sigmoid2, ...}")
        spec = cls(name=str(value.pop("name")), options=value)
        spec.config()
        return spec

    def config(self) -> GateConfig:
        """Return the validated settings of the named gate."""
        gate = GATES[self.name]
        try:
            return gate.Config(**self.options)
        except ValidationError as error:
            raise explain(error, gate.Config) from None

    @property
    def hash(self) -> str:
        """Twelve hex digits over the name and all settings, defaults included."""
        content = {"name": self.name, **self.config().model_dump(mode="json")}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]

    def build(self, shape: GateShape) -> Gate:
        """Make the gate for a slot of these sizes."""
        gate = GATES[self.name]
        if shape.slot not in gate.slots:
            fitting = sorted(n for n in GATES if shape.slot in GATES[n].slots)
            raise ConfigError(
                f"gate {self.name!r} does not fit slot {shape.slot!r}",
                where=f"model.gates.{shape.slot}",
                remedy=f"it fits {sorted(gate.slots)}; this slot takes {fitting}",
            )
        return gate(self.config(), shape)


class Gate(nn.Module):
    """Maps ``(x, context)`` to a mask for ``x`` or to mixture weights, for one slot.

    A subclass sets ``slots`` and ``Config`` and writes :meth:`forward`; registering it buys the contract
    suite. :meth:`gated` is what models call; a fused kernel may override it.

    Args:
        config: the gate's own settings.
        shape: the sizes of the slot it stands in.
    """

    name: ClassVar[str] = ""
    slots: ClassVar[frozenset[str]] = frozenset()
    Config: ClassVar[type[GateConfig]] = GateConfig
    bound: ClassVar[float] = 1.0
    """Upper end of the mask's range [floor, bound]; may be infinite."""
    floor: ClassVar[float] = 0.0
    """Lower end of the mask's range."""
    simplex: ClassVar[bool] = True
    """Slots expert and interaction: the weights of a row are non-negative and add up to 1."""
    recalls: ClassVar[bool] = False
    """Slot ``sequence``: whether ``pool`` finds by content what a history held, without the model's scores. The
    contract suite holds it to that, with multi-query associative recall."""
    source: ClassVar[str] = ""
    """The paper, as an arXiv id or a title."""
    fused: bool = True
    """Whether fast operators may run; ``model.kernels`` of the model sets it."""

    def __init__(self, config: GateConfig, shape: GateShape) -> None:
        super().__init__()
        self.config, self.shape = config, shape

    @property
    def by_context(self) -> bool:
        """Slots feature and field: whether ``x`` has no say in the mask, so that one context needs but one mask."""
        return False

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return the mask, broadcastable to ``x``; or what the slot asks for instead of a mask.

        ==========  ===================  =======================  ==========================================
        slot        ``x``                ``context``              result
        ==========  ===================  =======================  ==========================================
        feature     (B, D)               (B, C), (1, C) or None   mask
        field       (B, F, D)            (B, C), (1, C) or None   mask
        selection   (B, F, D)            logits s_v (B, F)        mask (B, F, 1); D may be 0
        cross       (B, D)               None                     mask, of the layer's input
        fusion      (B, D1)              (B, D2), other stream    mask
        attention   (B, H, L, D)         (B, L, C), layer input   mask of the heads' outputs
        sequence    (T, D), jagged       (T, C), query a value    mask of the values
        expert      (B, D)               None                     weights (B, K), K = ``shape.choices``
        depth       (B, D)               (B, 1), doubt in bits    probability to go on, (B or 1, 1)
        interaction (P, K), logits       None                     weights (P, K) of P pairs' K treatments
        ==========  ===================  =======================  ==========================================

        Args:
            x: what is gated.
            context: what decides; (1, C) when it is the same for every row; None when the slot has none and
                ``x`` itself decides.
        """
        raise NotImplementedError(f"gate {type(self).__name__} lacks a forward for slot {self.shape.slot!r}")

    def gated(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return ``x`` times the mask, shape of ``x``."""
        return x * self(x, context)

    def cross(self, c0: Tensor, c: Tensor, layer: nn.Linear) -> Tensor:
        """Slot ``cross``: return a whole cross layer, c0 * gated(W c + b) + c; a fused kernel may override it.

        Args:
            c0: input of the network, (B, D).
            c: input of the layer, (B, D).
            layer: W and b.
        """
        return torch.addcmul(c, c0, self.gated(layer(c), c))

    def cross_network(self, c0: Tensor, gates: Collection[Gate], layers: Collection[nn.Linear]) -> Tensor:
        """Slot ``cross``: return what all layers make of c0, one after the other; a fused kernel may override it.

        Args:
            c0: input of the network, (B, D).
            gates: of each layer, this one first, all made by one spec.
            layers: W and b of each.
        """
        c = c0
        for gate, layer in zip(gates, layers, strict=True):
            c = gate.cross(c0, c, layer)
        return c

    def attend(self, scores: Tensor, query: Tensor) -> Tensor:
        """Slot ``attention``: return the attention weights, softmax by default.

        Args:
            scores: (B, H, Q, L), scaled; -inf where a key is absent.
            query: the layer's input at the query positions, (B, Q, C).

        Returns:
            Weights of the same shape, 0 where a key is absent, even where all of them are.
        """
        return present_softmax(scores)

    def pool(self, values: Tensor, scores: Tensor, offsets: Tensor, query: Tensor) -> Tensor:
        """Slot ``sequence``: return one vector a history, by default the sum of its values times their scores.

        Args:
            values: behaviours of all histories, oldest first, (T, D).
            scores: what the model's own attention gives each behaviour, (T,).
            offsets: where each history begins, and T at the end, (B + 1,).
            query: the candidate, (B, D).

        Returns:
            (B, D); zeros for an empty history.
        """
        return jagged_pool(values, scores, offsets, fused=self.fused)

    def mixture(self, x: Tensor, values: Tensor, offsets: Tensor, query: Tensor) -> Tensor:
        """Slot ``expert`` in a model with histories: return weights (B, K), by default those of ``x`` alone.

        Args:
            x: the row, (B, D).
            values: behaviours of all histories, oldest first, (T, d).
            offsets: where each history begins, and T at the end, (B + 1,).
            query: the candidate, (B, d).
        """
        return self(x)

    def anneal(self, done: float) -> None:
        """Take note, before each training step, of the share of training that is done, 0 to 1."""

    def penalty(self) -> Tensor:
        """Return what the gate adds to the loss: a scalar, 0 if it asks for nothing."""
        return torch.zeros(())

    @torch.no_grad()
    def telemetry(self, mask: Tensor) -> dict[str, float]:
        """Describe a mask: mean, standard deviation, share of values at either end, entropy in bits.

        The entropy is binary, of each value. In slots ``expert`` and ``interaction`` it is that of each row's
        shares, a share being the size of a weight over that of all, and there are besides: ``zeros``, how many
        weights are exactly 0; ``importance``, the squared coefficient of variation of the choices' mean shares, 0
        when all are used alike; ``choice_0`` and so on, the mean weight of each. Ends are ``floor`` and ``bound``,
        or 0 and 2 where these are infinite: 1 is in the middle.
        """
        if self.shape.slot in ("expert", "interaction"):
            return _describe_weights(mask.detach().float())
        low, high = (self.floor, self.bound) if math.isfinite(self.bound - self.floor) else (0.0, 2.0)
        m = ((mask.detach().float() - low) / (high - low)).clamp(0, 1)
        p = m.clamp(1e-7, 1 - 1e-7)
        entropy = -(p * p.log2() + (1 - p) * (1 - p).log2())
        return {
            "mean": float(mask.float().mean()),
            "std": float(mask.float().std(correction=0)),
            "saturation": float(((m < 0.05) | (m > 0.95)).float().mean()),
            "entropy": float(entropy.mean()),
        }


def present_softmax(scores: Tensor) -> Tensor:
    """Return the softmax over the keys that are present: zeros, not NaN, where none is.

    Args:
        scores: (..., L); -inf where a key is absent.

    Example:
        >>> none, half = [-torch.inf] * 3, [1.0, 1.0, -torch.inf]
        >>> present_softmax(torch.tensor([none, half]))
        tensor([[0.0000, 0.0000, 0.0000],
                [0.5000, 0.5000, 0.0000]])
    """
    nothing = scores.detach().amax(-1, keepdim=True).isneginf()
    # The smallest number is as good as -inf beside any other, and alone it leaves no NaN to carry back.
    return scores.clamp(min=torch.finfo(scores.dtype).min).softmax(-1).masked_fill(nothing, 0)


def _describe_weights(weights: Tensor) -> dict[str, float]:
    shares = weights.abs() / weights.abs().sum(1, keepdim=True).clamp_min(1e-12)  # (B, K)
    entropy = -(shares * shares.clamp_min(1e-12).log2()).sum(1)
    uses = shares.mean(0)
    return {
        "mean": float(weights.mean()),
        "std": float(weights.std(correction=0)),
        "saturation": float(((shares < 0.05) | (shares > 0.95)).float().mean()),
        "entropy": float(entropy.mean()),
        "zeros": float((weights == 0).float().mean()),
        "importance": float(uses.var(correction=0) / uses.mean().square().clamp_min(1e-12)),
        **{f"choice_{k}": float(mean) for k, mean in enumerate(weights.mean(0))},
    }


GATES: Registry[type[Gate]] = Registry("gate", group="sluice.gates", base=Gate)
register_gate = GATES.register
