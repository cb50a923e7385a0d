"""The CTRModel: a Batch in, logits out; and how one is made from a name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from ctr_models.batch import Batch
from ctr_models.candidates import Candidates
from ctr_models.embeddings import FeatureEmbedding
from ctr_models.errors import ConfigError, explain, nearest
from ctr_models.gates.base import Gate, GateSpec
from ctr_models.layers.selection import SearchedSelection, Selection
from ctr_models.registry import Registry
from ctr_models.schema import Schema

HOOKS = ("mixture", "attend", "pool")
"""What a gate may do beside its forward."""
SELECTION = "selection"
"""The slot that every model has; see :meth:`CTRModel.select`."""


class ModelConfig(BaseModel):
    """Settings that every model has; a model's own config derives from it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    embedding_std: float = 1e-4
    """Standard deviation of the initial embeddings."""
    kernels: bool = True
    """Whether fast operators may take the place of their plain definitions."""


class ModelSpec(BaseModel):
    """A model by name, settings and gates, as it stands in a config.

    Example:
        >>> ModelSpec.parse({"name": "gdcn", "cross_layers": 2, "gates": {"cross": "sigmoid"}}).gates["cross"].name
        'sigmoid'
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    options: dict[str, Any] = Field(default_factory=dict)
    gates: dict[str, GateSpec] = Field(default_factory=dict)

    @classmethod
    def parse(cls, value: str | Mapping[str, Any] | ModelSpec) -> ModelSpec:
        """Read ``name`` or ``{name: ..., gates: {slot: gate}, option: ...}`` and check every key."""
        if isinstance(value, ModelSpec):
            return value
        if not isinstance(value, str | Mapping):
            raise ConfigError(f"expected a name or keys, got {value!r}", where="model", remedy="write model: gdcn")
        given: dict[str, Any] = {"name": value} if isinstance(value, str) else dict(value)
        if "name" not in given:
            raise ConfigError("a model needs a name", where="model", remedy=f"one of {list(MODELS)}")
        name, gates = str(given.pop("name")), given.pop("gates", None) or {}
        with _located("model.name"):
            model = MODELS[name]
        if not isinstance(gates, Mapping):
            raise ConfigError(f"expected slot: gate, got {gates!r}", where="model.gates")
        slots = model.slots()
        for slot in gates:
            if slot not in slots:
                raise ConfigError(
                    f"model {name!r} has no gate slot {slot!r}",
                    where=f"model.gates.{slot}",
                    remedy=nearest(slot, slots),
                )
        parsed: dict[str, GateSpec] = {}
        for slot, gate in gates.items():
            with _located(f"model.gates.{slot}"):
                parsed[slot] = GateSpec.parse(gate)
        spec = cls(name=name, options=given, gates=parsed)
        spec.config()
        return spec

    def to_dict(self) -> dict[str, Any]:
        """Return the mapping that :meth:`parse` reads."""
        gates = {slot: {"name": g.name, **g.options} for slot, g in self.gates.items()}
        return {"name": self.name, **self.options, **({"gates": gates} if gates else {})}

    def config(self) -> ModelConfig:
        """Return the validated settings of the named model."""
        model = MODELS[self.name]
        try:
            return model.Config(**self.options)
        except ValidationError as error:
            raise explain(error, model.Config, under="model", beside=("name", "gates")) from None

    @property
    def all_gates(self) -> dict[str, GateSpec]:
        """The gate in every slot of the model, defaults included; slot ``selection`` only if it is given."""
        defaults = {slot: GateSpec.parse(gate) for slot, gate in MODELS[self.name].default_gates.items()}
        return {**defaults, **self.gates}

    def build(self, schema: Schema) -> CTRModel:
        """Make the model for these inputs."""
        model = MODELS[self.name](self.config(), schema, self.all_gates)
        for module in model.modules():
            if hasattr(module, "fused"):
                module.fused = model.config.kernels  # type: ignore[assignment]
        gate = self.gates.get(SELECTION)
        if gate is not None and gate.name != "none":
            model.select(SearchedSelection(schema, gate))
        return model


@contextmanager
def _located(path: str) -> Iterator[None]:
    """Say where in the config an error below stands."""
    try:
        yield
    except ConfigError as error:
        where = f"{path}.{error.where}" if error.where else path
        raise ConfigError(error.problem, where=where, remedy=error.remedy) from None


class CTRModel(nn.Module):
    """Predicts the logit of a click.

    A subclass sets ``Config`` and ``default_gates`` (its slots, and the gate in each unless a config says
    otherwise) and writes :meth:`forward`. Embeddings come from
    :class:`ctr_models.embeddings.FeatureEmbedding`, never from private tables, so that every model shards.

    Args:
        config: the model's own settings.
        schema: its inputs.
        gates: the gate in each slot.
    """

    name: ClassVar[str] = ""
    Config: ClassVar[type[ModelConfig]] = ModelConfig
    default_gates: ClassVar[Mapping[str, str]] = {}
    source: ClassVar[str] = ""
    """The paper, as an arXiv id or a title."""
    deciders: ClassVar[tuple[str, ...]] = ()
    """Names of parameters that decide what the model is: they learn at ``train.selection_lr`` and don't decay."""

    def __init__(self, config: ModelConfig, schema: Schema, gates: Mapping[str, GateSpec]) -> None:
        super().__init__()
        self.config, self.schema, self.gate_specs = config, schema, dict(gates)
        self.selection: Selection | None = None

    def forward(self, batch: Batch) -> Tensor:
        """Return logits, (B,) float32."""
        raise NotImplementedError

    @property
    def shares(self) -> bool:
        """Whether :meth:`scores` computes what candidates share once a user; if not, it computes plain rows."""
        return getattr(type(self).forward, "takes_candidates", False)

    @torch.no_grad()
    def scores(self, candidates: Candidates) -> Tensor:
        """Return the logits of candidates, (N,), what a user shares with all of them computed once a user.

        A model whose forward is marked by :func:`ctr_models.candidates.takes_candidates` looks shared fields up
        once a user, and so computes its first layer; any other one gets plain rows. Either gives what
        :meth:`forward` gives for plain rows, to rounding. For evaluation, unsharded; there are no gradients.

        Args:
            candidates: of this model's schema.

        Raises:
            ValueError: the candidates do not bring each field of the schema once.
            RuntimeError: the model is in training mode, where a row's logit may depend on the others.
        """
        if self.training:
            raise RuntimeError("scores are computed in evaluation mode, the model is training: call model.eval()")
        candidates.check(self.schema)
        if not len(candidates):
            return candidates.own.label.new_empty(0)
        if not candidates.names:
            return self(candidates.own)
        if self.shares:
            return self(candidates)
        return self(candidates.joined(self.schema))

    @property
    def tasks(self) -> tuple[str, ...]:
        """What the model predicts besides the click, of ``schema.tasks``: nothing, unless a subclass says so."""
        return ()

    def task_logits(self, batch: Batch) -> Tensor:
        """Return the logits of the click, as :meth:`forward` does, and of each of :attr:`tasks`, (B, 1 + T)."""
        return self(batch).unsqueeze(1)

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the training loss (scalar: cross-entropy plus the gates' penalties) and the logits (B,)."""
        logits = self(batch)
        return self.loss_of(logits, batch), logits

    def loss_of(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return the cross-entropy of these logits plus the gates' penalties, for a model that adds its own."""
        return self.penalized(F.binary_cross_entropy_with_logits(logits.float(), batch.label))

    def penalized(self, loss: Tensor) -> Tensor:
        """Return a loss plus what the gates and the selection ask for."""
        for gate in self.gates():
            if type(gate).penalty is not Gate.penalty:  # a zero on the CPU is a transfer on every step
                loss = loss + gate.penalty().to(loss.device)
        return loss if self.selection is None else loss + self.selection.penalty().to(loss.device)

    @classmethod
    def slots(cls) -> tuple[str, ...]:
        """Return the slots that a config may fill: the model's own, and ``selection``."""
        return (*cls.default_gates, SELECTION)

    def select(self, selection: Selection) -> None:
        """Mask every feature value, in each of the model's embeddings, the linear term's included.

        So a value can be masked out of a model that knows nothing of it: what is dropped has no weight left.
        """
        if self.selection is not None:
            raise ValueError("the model has a selection already")
        for module in self.modules():
            if isinstance(module, FeatureEmbedding):
                module.mask(selection)
        self.selection = selection

    def gates(self) -> list[Gate]:
        """Return every gate in the model."""
        return [m for m in self.modules() if isinstance(m, Gate)]

    @torch.no_grad()
    def telemetry(self, batch: Batch) -> dict[str, dict[str, float]]:
        """Describe what each gate does to a batch, by the gate's path in the model."""
        seen: dict[str, dict[str, float]] = {}
        handles = []
        for path, gate in self.named_modules():
            if isinstance(gate, Gate):
                # A fused ``gated`` never makes the mask; for one pass the plain one, by way of it, takes its place.
                gate.gated = partial(Gate.gated, gate)  # type: ignore[method-assign]
                gate.cross = partial(Gate.cross, gate)  # type: ignore[method-assign]
                gate.cross_network = partial(Gate.cross_network, gate)  # type: ignore[method-assign]
                for hook in HOOKS:
                    if getattr(type(gate), hook) is not getattr(Gate, hook):
                        setattr(gate, hook, partial(_told, seen, path, gate, getattr(gate, hook)))
                handles.append(gate.register_forward_hook(partial(_noted, seen, path)))
        was_training = self.training
        try:
            self.eval()
            self.task_logits(batch)
        finally:
            self.train(was_training)
            for handle in handles:
                handle.remove()
            for gate in self.gates():
                for method in ("gated", "cross", "cross_network", *HOOKS):
                    gate.__dict__.pop(method, None)
        return seen


def _noted(seen: dict[str, dict[str, float]], path: str, gate: Gate, _inputs: Any, mask: Tensor) -> None:
    """Note what the mask looks like, unless one of the gate's hooks has told already."""
    seen.setdefault(path, gate.telemetry(mask))


def _told(
    seen: dict[str, dict[str, float]], path: str, gate: Gate, hook: Callable[..., Tensor], *inputs: Tensor
) -> Tensor:
    """Call a hook of the gate and note what it gives: it does not pass through forward."""
    given = hook(*inputs)
    seen[path] = gate.telemetry(given)
    return given


MODELS: Registry[type[CTRModel]] = Registry("model", group="sluice.models", base=CTRModel)
register_model = MODELS.register


def create_model(
    name: str,
    features: Schema,
    *,
    gates: Mapping[str, str | dict[str, Any]] | None = None,
    **options: Any,
) -> CTRModel:
    """Make a model by name, without the pipelines.

    Args:
        name: a registered model or a dotted path.
        features: its inputs.
        gates: gate by slot; the model's own defaults elsewhere.
        options: fields of the model's config.

    Returns:
        A freshly initialised model. Seed torch before for a reproducible one.

    Raises:
        ConfigError: unknown name, slot, gate or option, with the nearest valid one.

    Example:
        >>> model = create_model("gdcn", Schema.of({"user": 100, "item": 50}), gates={"cross": "sigmoid"})
        >>> model.gate_specs["cross"].name
        'sigmoid'
    """
    return ModelSpec.parse({"name": name, "gates": gates or {}, **options}).build(features)
