"""How a model is trained, as a list of phases that can be resumed one by one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError

from ctr_models.errors import ArtifactError, ConfigError, explain
from ctr_models.model import ModelSpec
from ctr_models.registry import Registry
from ctr_models.schema import Schema
from pipelines.features.files import atomic_write
from pipelines.training.config import OPERATIONAL, RecipeConfig

if TYPE_CHECKING:
    from ctr_models.model import CTRModel
    from pipelines.config import RunConfig
    from pipelines.evaluation.ranking import Rankings
    from pipelines.features.prepare import EncodedData
    from pipelines.training.distributed import Ranks


Judge = Callable[["CTRModel", "EncodedData", str, int], "Rankings"]
"""Judges a model in one process on a split, some rows at a time; what it returns has ``metrics``."""


@dataclass
class Context:
    """What passes from phase to phase.

    Args:
        config: of the run.
        data: encoded features; a phase that encodes anew or drops values puts others, under ``run_dir``, here.
        run_dir: where phases keep what they make; each has its own folder there.
        me: this process.
        model: the model to train next; a phase that decides on another changes it.
        schema: its inputs; likewise.
        resume: take up a phase that was broken off.
        progress: show a progress bar.
        on_epoch: called on rank 0 with each epoch's record.
        outputs: what each finished phase left, by its name: plain values.
        judge: the recipe's own judge of a split, if it has one.
    """

    config: RunConfig
    data: EncodedData
    run_dir: Path
    me: Ranks
    model: ModelSpec
    schema: Schema
    resume: bool = False
    progress: bool = True
    on_epoch: Callable[[dict[str, Any]], None] = lambda record: None
    outputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    judge: Judge | None = None


class Phase:
    """One step of a recipe. A subclass sets ``name`` and writes :meth:`run`."""

    name: ClassVar[str] = ""

    def run(self, context: Context) -> Context:
        """Do the work, put plain values into ``context.outputs[self.name]``, return the context.

        What a user should be told goes into the output ``report``: a ``title``, ``rows``, a list of mappings with
        equal keys, and, if some numbers are to be tracked as metrics, ``totals``, these by name. The metrics of the
        valid rows under the model that a phase leaves go into the output ``valid``: they become one more report.

        A phase keeps its files in ``context.run_dir / self.name`` and, when ``context.resume`` is set, goes on
        from what it finds there.
        """
        raise NotImplementedError


class RecipeOptions(BaseModel):
    """Options of a recipe; a recipe's own derive from it."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Recipe:
    """Lists phases. The last phase that trains leaves ``weights`` in its outputs.

    Args:
        options: checked against the recipe's ``Options``.
    """

    name: ClassVar[str] = ""
    Options: ClassVar[type[RecipeOptions]] = RecipeOptions

    def __init__(self, options: RecipeOptions) -> None:
        self.options = options

    def phases(self) -> Sequence[Phase]:
        """Return the phases, in order."""
        raise NotImplementedError

    def judge(self) -> Judge | None:
        """Return what judges the valid and the test rows; None: the probabilities of the rows."""
        return None


RECIPES: Registry[type[Recipe]] = Registry("recipe", group="sluice.recipes", base=Recipe)
register_recipe = RECIPES.register


def make_recipe(config: RecipeConfig) -> Recipe:
    """Make a recipe by name.

    Raises:
        ConfigError: unknown name or option.

    Example:
        >>> [phase.name for phase in make_recipe(RecipeConfig()).phases()]
        ['fit']
    """
    cls = RECIPES[config.name]
    try:
        return cls(cls.Options(**config.options))
    except ValidationError as error:
        raise explain(error, cls.Options, under="recipe.options") from None


def run_recipe(recipe: Recipe, context: Context) -> Context:
    """Run the phases that are not done yet.

    A finished phase leaves ``phases/<number>-<name>.json`` in the run's folder: its outputs, and the model and
    inputs as it left them, and where its encoded features lie if it made others. On resume it is skipped.

    Raises:
        ConfigError: a phase is finished that another recipe, or other settings, have run.
    """
    folder, phases = context.run_dir / "phases", recipe.phases()
    markers = [folder / f"{number}-{phase.name}.json" for number, phase in enumerate(phases)]
    if context.resume and context.me.first and set(folder.glob("*.json")) - set(markers):
        raise _other("phases of another recipe are finished", folder)
    for marker, phase in zip(markers, phases, strict=True):
        # Rank 0 decides: a marker may appear between two ranks' looks.
        left = context.me.share(_read(marker) if context.resume and context.me.first else None)
        settings = _settings(phase, context)
        if left is not None:
            if left["settings"] != settings:
                raise _other(f"phase {phase.name!r} was finished with other settings", marker)
            context.outputs[phase.name] = left["outputs"]
            context.model = ModelSpec.parse(left["model"])
            context.schema = Schema.model_validate(left["schema"])
            if left.get("data"):
                context.data = _opened(context.run_dir / left["data"])
            continue
        given = context.data.path
        context = phase.run(context)
        if context.me.first:
            content: dict[str, Any] = {
                "settings": settings,
                "outputs": context.outputs.get(phase.name, {}),
                "model": context.model.to_dict(),
                "schema": context.schema.model_dump(mode="json"),
            }
            if context.data.path != given:
                content["data"] = context.data.path.relative_to(context.run_dir).as_posix()
            atomic_write(marker, json.dumps(content, indent=1))
        context.me.wait()
    return context


def _opened(path: Path) -> EncodedData:
    from pipelines.features.prepare import EncodedData

    return EncodedData.open(path)


def _read(marker: Path) -> dict[str, Any] | None:
    if not marker.exists():
        return None
    try:
        left = json.loads(marker.read_text(encoding="utf-8"))
        if left.keys() >= {"settings", "outputs", "model", "schema"}:
            return left
    except (ValueError, AttributeError):
        pass
    raise ArtifactError(
        "the phase's marker is damaged", where=str(marker), remedy="delete it to run the phase again"
    )


def _settings(phase: Phase, context: Context) -> str:
    """Hash of all that decides what a phase comes to."""
    options = getattr(phase, "options", None)
    content = {
        "options": None if options is None else options.model_dump(mode="json"),
        "model": context.model.to_dict(),
        "schema": context.schema.model_dump(mode="json"),
        "data": context.data.state.hash,
        "seed": context.config.seed,
        "train": context.config.train.model_dump(mode="json", exclude=set(OPERATIONAL)),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _other(problem: str, where: Path) -> ConfigError:
    return ConfigError(
        problem, where=str(where), remedy="resume with the run's own config.yaml, or start a new run"
    )


class Fit(Phase):
    """Trains the context's model; outputs ``weights`` (a checkpoint), ``history``, ``best_epoch`` and speed."""

    name = "fit"

    def run(self, context: Context) -> Context:
        """Train until the epochs are over or stopping says so."""
        from pipelines.training.fit import fit
        from pipelines.training.judging import judge_best

        trained = fit(context, context.run_dir / self.name, begin=self.begin(context))
        context.outputs[self.name] = {**trained, "valid": judge_best(trained)}
        return context

    def begin(self, context: Context) -> Callable[[CTRModel], None] | None:
        """Return what changes the freshly made model before it is trained; None: nothing."""
        return None


class Full(Fit):
    """Trains the model as it is given, before anything is decided."""

    name = "full"

    def run(self, context: Context) -> Context:
        """Train until the epochs are over or stopping says so."""
        super().run(set_apart(context, self.name))
        return context


class Retrain(Fit):
    """Trains the model anew, as the phases before have decided it, from fresh weights."""

    name = "retrain"


def set_apart(context: Context, phase: str) -> Context:
    """Return the context with its epochs recorded under the phase's name: the retraining's begin at 1 again."""

    def told(record: dict[str, Any]) -> None:
        context.on_epoch({k if k in ("epoch", "best") else f"{phase}/{k}": v for k, v in record.items()})

    return replace(context, on_epoch=told)


@register_recipe("fit")
class FitRecipe(Recipe):
    """One phase: train."""

    def phases(self) -> Sequence[Phase]:
        """Return the one phase."""
        return [Fit()]
