"""The Experiment: what is compared with what, on whom, and how it is decided. Offline and online read the same.

What trains models is imported only where an experiment is run offline: who reads one online needs no torch.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, model_validator

from ctr_models.errors import ConfigError, SluiceError, explain, nearest
from pipelines.experiments.statistics import METRICS, Difference
from pipelines.training.config import RecipeConfig

if TYPE_CHECKING:
    from ctr_models.model import ModelSpec
    from pipelines.config import RunConfig

Metric = Literal["auc", "logloss", "gauc"]
OnlineMetric = Literal["ctr", "conversion_rate"]
"""Clicks, or conversions, per candidate shown."""
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
Served = Annotated[
    str,
    Field(max_length=250, pattern=r"^(models:/[A-Za-z0-9][\w.-]*(@[\w.-]+|/[0-9]+)|[A-Za-z0-9][\w.-]*)$"),
]
"""``models:/name@alias``, ``models:/name/version``, or the name of a bundle that the server has; never a path."""
Weights = dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]]
Share = Annotated[float, Field(ge=0, le=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Arm(_Strict):
    """A name and what it changes in the model section of the configuration.

    Rows, seeds and budget are the experiment's, the same for every arm; so an arm can change nothing else.

    Example:
        >>> Arm.parse("gated=model.gates.cross=sigmoid").model
        {'gates': {'cross': 'sigmoid'}}
        >>> from ctr_models import ModelSpec
        >>> base = ModelSpec.parse({"name": "gdcn", "cross_layers": 2})
        >>> Arm.parse("open=model.gates.cross=none").spec(base).to_dict()
        {'name': 'gdcn', 'cross_layers': 2, 'gates': {'cross': {'name': 'none'}}}
    """

    name: Name
    model: dict[str, Any] = Field(default_factory=dict)
    """Keys of the model section, laid over it; a ``name`` starts a model (or a gate) afresh."""
    recipe: RecipeConfig | None = None
    """How this arm is trained, if otherwise than the configuration says."""
    bundle: Served | None = None
    """What scores this arm's requests online; None: whatever would without the experiment."""
    gate_hashes: dict[str, Annotated[str, Field(pattern=r"^[0-9a-f]{6,64}$")]] = Field(default_factory=dict)
    """Hash of the GateSpec that the bundle must have in a slot; a bundle with another does not serve this arm."""

    @classmethod
    def parse(cls, text: str) -> Arm:
        """Read ``name=model.key=value,model.key=value``; ``name`` alone is the configuration as it stands."""
        from pipelines.config import apply_override

        name, _, rest = text.partition("=")
        tree: dict[str, Any] = {"name": name}
        for override in _split(rest):
            if override.partition("=")[0].split(".")[0] not in ("model", "recipe"):
                raise ConfigError(
                    f"{override!r} is not of the model or the recipe",
                    where=f"arm {name!r}",
                    remedy="write name=model.gates.cross=none; data, seeds and budget are the same for all arms",
                )
            apply_override(tree, override)
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            raise explain(error, cls, f"arm {name!r}") from None

    @classmethod
    def of_gate(cls, gate: str, base: ModelSpec) -> Arm:
        """Return the arm that puts a gate into every slot of the model that takes it.

        Raises:
            ConfigError: unknown gate, or one that fits no slot of this model.
        """
        from ctr_models.gates.base import GATES
        from ctr_models.model import MODELS, SELECTION

        slots = [slot for slot in MODELS[base.name].default_gates if slot in GATES[gate].slots]
        if not slots and SELECTION in GATES[gate].slots:
            slots = [SELECTION]
        if not slots:
            fitting = sorted(g for g in GATES if GATES[g].slots & set(MODELS[base.name].slots()))
            raise ConfigError(
                f"gate {gate!r} fits no slot of model {base.name!r}",
                where=f"arm {gate!r}",
                remedy=f"gates that do: {fitting}",
            )
        return cls(name=gate, model={"gates": dict.fromkeys(slots, gate)})

    def spec(self, base: ModelSpec) -> ModelSpec:
        """Return the arm's model: ``base`` with the changes laid over it.

        Raises:
            ConfigError: naming the arm, and the key that the model does not have.
        """
        from ctr_models.model import ModelSpec

        try:
            return ModelSpec.parse(_laid_over(base.to_dict(), self.model))
        except SluiceError as error:
            where = f"arm {self.name!r}: {error.where}" if error.where else f"arm {self.name!r}"
            raise ConfigError(error.problem, where=where, remedy=error.remedy) from None

    def gates(self, base: ModelSpec) -> dict[str, str]:
        """Return the hash of the gate in each slot: what identifies the arm in MLflow and in the event log."""
        return {slot: gate.hash for slot, gate in sorted(self.spec(base).all_gates.items())}

    def apply(self, config: RunConfig) -> RunConfig:
        """Return the configuration that trains this arm."""
        changed: dict[str, Any] = {"model": self.spec(config.model)}
        if self.recipe is not None:
            changed["recipe"] = self.recipe
        return config.model_copy(update=changed)


class Condition(_Strict):
    """Rows whose ``column`` is one of ``values``, or lies in [``least``, ``most``]. Missing values are outside.

    Example:
        >>> Condition(column="age", least=18).holds({"age": 17})
        False
    """

    column: str
    values: tuple[str | int | float | bool, ...] | None = None
    least: float | None = None
    most: float | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Condition:
        if (self.values is None) == (self.least is None and self.most is None):
            raise ValueError("a condition needs either values, or least or most")
        return self

    def holds(self, row: Mapping[str, Any]) -> bool:
        """Tell whether one raw row, or a request, is in the population."""
        value = row.get(self.column)
        if value is None:
            return False
        if self.values is not None:
            return value in self.values
        if not isinstance(value, int | float):
            return False
        return (self.least is None or value >= self.least) and (self.most is None or value <= self.most)

    def expression(self) -> Any:
        """Return the same as a polars expression, false where the column is null."""
        import polars as pl

        column = pl.col(self.column)
        if self.values is not None:
            return column.is_in(list(self.values)).fill_null(False)
        least = -math.inf if self.least is None else self.least
        most = math.inf if self.most is None else self.most  # of polars, NaN is beyond it
        return column.is_between(least, most).fill_null(False)


class Allocation(_Strict):
    """How users are dealt to arms online: the same user always to the same arm."""

    weights: Weights = Field(default_factory=dict)
    """Shares by arm, of any sum; empty: equal. Shadow arms take none."""
    salt: str = ""
    """Another salt deals anew. Empty: the experiment's name."""


class Stage(_Strict):
    """The shares of the arms from a moment on."""

    at: AwareDatetime
    weights: Weights


class Layer(_Strict):
    """The part of a layer that an experiment takes. Parts of one layer don't overlap, so no unit is in two of its
    experiments; layers are dealt independently of each other.

    Example:
        >>> Layer(name="ranking", start=0, stop=0.5).stop
        0.5
    """

    name: Name
    start: Share = 0.0
    stop: Share = 1.0

    @model_validator(mode="after")
    def _holds_something(self) -> Layer:
        if self.start >= self.stop:
            raise ValueError("stop must be greater than start")
        return self


class OnlineGuardrail(_Strict):
    """A rate of events that a challenger may not harm by more than ``bound``."""

    metric: OnlineMetric
    bound: float = Field(gt=0, lt=1)


class Online(_Strict):
    """How an experiment runs on live requests."""

    unit: str = Field("user_id", min_length=1, max_length=100)
    """The column of the request whose value is dealt to an arm: always to the same."""
    model: Name | None = None
    """Only requests for this model; None: for any."""
    starts: AwareDatetime | None = None
    ends: AwareDatetime | None = None
    ramp: tuple[Stage, ...] = Field((), max_length=100)
    """Later shares, in the order of time; those of ``allocation`` hold until the first."""
    holdout: float = Field(0.0, ge=0, lt=1)
    """Share of units left out, served as if there were no experiment; the same ones in all of a layer."""
    layer: Layer | None = None
    """None: a layer of its own."""
    shadow: tuple[Name, ...] = ()
    """Arms that score every request of the experiment and serve none."""
    epsilon: Share = 0.0
    """Share of requests answered in uniformly random order, for off-policy evaluation."""
    primary: OnlineMetric = "ctr"
    guardrails: tuple[OnlineGuardrail, ...] = ()

    @model_validator(mode="after")
    def _in_order(self) -> Online:
        times = [stage.at for stage in self.ramp]
        if any(b <= a for a, b in pairwise(times)):
            raise ValueError("the stages of ramp must follow each other in time")
        if self.starts is not None and self.ends is not None and self.ends <= self.starts:
            raise ValueError("ends must be later than starts")
        return self


class Guardrail(_Strict):
    """A metric that a challenger may not harm by more than ``bound``, even at the bad end of its interval."""

    metric: Metric
    bound: float = Field(gt=0)
    """In the metric's unit, for example 0.001 of logloss."""


class Decision(_Strict):
    """When a challenger wins."""

    alpha: float = Field(0.05, gt=0, lt=1)
    """Chance of a wrong verdict on a metric, over all challengers together."""
    minimum_effect: float = Field(0.0, ge=0)
    """The primary metric must improve by this much to be worth a release."""
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**31)], ...] = Field((2026, 2027, 2028), min_length=1)
    """Each arm is trained with each."""
    resamples: int = Field(1000, ge=100)
    cluster: Literal["user", "row"] = "user"
    """What the bootstrap resamples; rows of data that name no users are clusters of their own."""


class Experiment(_Strict):
    """Arms, population, allocation, metrics and the rule that decides.

    Example:
        >>> e = Experiment(name="cross-gate", control="open", arms=(
        ...     Arm.parse("open=model.gates.cross=none"), Arm.parse("gated=model.gates.cross=sigmoid")))
        >>> e.challengers, e == Experiment.from_tree(e.to_tree())
        (('gated',), True)
    """

    name: Name
    control: str
    arms: tuple[Arm, ...] = Field(min_length=2)
    population: tuple[Condition, ...] = ()
    """All must hold; none takes every row. Offline they are read from ``features.keep``."""
    allocation: Allocation = Allocation()
    primary: Metric = "auc"
    guardrails: tuple[Guardrail, ...] = ()
    decision: Decision = Decision()
    online: Online | None = None
    """None: the experiment is offline only."""

    @model_validator(mode="after")
    def _consistent(self) -> Experiment:
        names = [arm.name for arm in self.arms]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise ValueError(f"arms appear twice: {', '.join(twice)}")
        if self.control not in names:
            raise ValueError(f"control {self.control!r} is no arm; {nearest(self.control, names)}")
        shadow = self.online.shadow if self.online is not None else ()
        for name in shadow:
            if name not in names:
                raise ValueError(f"online.shadow names {name!r}, which is no arm; {nearest(name, names)}")
        if self.control in shadow:
            raise ValueError("the control can't be a shadow arm: somebody has to be served by it")
        live = [name for name in names if name not in shadow]
        given = {"allocation.weights": self.allocation.weights} if self.allocation.weights else {}
        if self.online is not None:
            given |= {f"online.ramp.{i}.weights": stage.weights for i, stage in enumerate(self.online.ramp)}
        for where, weights in given.items():
            if set(weights) != set(live):
                what = "the arms that serve" if shadow else "the arms"
                raise ValueError(f"{where} name {sorted(weights)}, {what} are {sorted(live)}")
            if not sum(weights.values()) > 0:
                raise ValueError(f"{where} sum to zero")
        if len(set(self.decision.seeds)) < len(self.decision.seeds):
            raise ValueError("decision.seeds appear twice")
        return self

    @classmethod
    def load(cls, path: Path) -> Experiment:
        """Read an experiment's YAML file.

        Raises:
            ConfigError: naming the file, the key, and the nearest valid one.
        """
        from pipelines.config import read_yaml

        return cls.from_tree(read_yaml(Path(path), remedy="give the YAML of an experiment"), str(path))

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any], source: str = "experiment") -> Experiment:
        """Check a mapping as :meth:`load` checks a file."""
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            raise explain(error, cls, source) from None

    def to_tree(self) -> dict[str, Any]:
        """Return the mapping that :meth:`from_tree` reads."""
        return json.loads(self.model_dump_json(exclude_defaults=True))

    def to_yaml(self) -> str:
        """Return the YAML that :meth:`load` reads back."""
        return yaml.safe_dump(self.to_tree(), sort_keys=False)

    @property
    def hash(self) -> str:
        """Twelve hex digits over everything that an offline result rests on, defaults included."""
        online: Any = {"online": True, "arms": {"__all__": {"bundle", "gate_hashes"}}}
        return digest(json.loads(self.model_dump_json(exclude=online)))

    @property
    def challengers(self) -> tuple[str, ...]:
        """Names of all arms but the control."""
        return tuple(arm.name for arm in self.arms if arm.name != self.control)

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The primary metric, then auc, logloss and those of the guardrails, each once."""
        return tuple(dict.fromkeys((self.primary, "auc", "logloss", *(g.metric for g in self.guardrails))))

    def stages(self, at: datetime | None = None) -> tuple[dict[str, float], ...]:
        """Return the weights of the arms that serve: first those of ``allocation``, then those of the ramp.

        Args:
            at: leave out the stages of the ramp that begin later.
        """
        shadow = self.online.shadow if self.online is not None else ()
        live = [arm.name for arm in self.arms if arm.name not in shadow]
        ramp = self.online.ramp if self.online is not None else ()
        begun = [stage.weights for stage in ramp if at is None or stage.at <= at]
        first = self.allocation.weights or dict.fromkeys(live, 1.0)
        return tuple({name: weights[name] for name in live} for weights in (first, *begun))

    def decide(self, differences: Sequence[Difference]) -> tuple[str, list[str]]:
        """Apply the rule: the winner's name, and a sentence for each challenger.

        A challenger wins if it is better on the primary metric, by the minimum effect at least, and the bad end
        of its interval stays within every guardrail. Of several, the one with the largest effect; of none, the
        control.
        """
        by = {(d.challenger, d.metric): d for d in differences}
        passed: dict[str, float] = {}
        reasons = []
        for name in self.challengers:
            primary = by[name, self.primary]
            broken = [g for g in self.guardrails if _harm(by[name, g.metric]) > g.bound]
            if primary.verdict != "better":
                reasons.append(f"{name}: {primary.verdict} on {self.primary}")
            elif abs(primary.value) < self.decision.minimum_effect:
                reasons.append(f"{name}: better on {self.primary}, but by less than the minimum effect")
            elif broken:
                listed = ", ".join(f"{g.metric} may worsen by {_harm(by[name, g.metric]):.3g}" for g in broken)
                reasons.append(f"{name}: better on {self.primary}, but beyond a guardrail: {listed}")
            else:
                passed[name] = abs(primary.value)
                reasons.append(f"{name}: better on {self.primary}, within all guardrails")
        return max(passed, key=lambda n: passed[n], default=self.control), reasons


def digest(content: Any) -> str:
    """Return twelve hex digits over a JSON value."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def _harm(difference: Difference) -> float:
    """How much the metric worsens at the bad end of the interval."""
    return -difference.low if METRICS[difference.metric] else difference.high


def _laid_over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Merge mappings; one that has a ``name`` replaces what it covers, unless that has the same name."""
    if "name" in above and above["name"] != below.get("name"):
        return dict(above)
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _laid_over(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def _split(text: str) -> list[str]:
    """Split at commas that stand outside brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for char in text:
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        elif char in "[{(":
            depth += 1
        elif char in "]})":
            depth -= 1
        elif char == "," and depth == 0:
            parts.append("")
            continue
        parts[-1] += char
    return [part.strip() for part in parts if part.strip()]
