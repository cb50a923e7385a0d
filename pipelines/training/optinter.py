"""Recipe ``optinter``: search how each pair of fields is treated, pick, retrain with the crosses that are kept."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from ctr_models.errors import ConfigError, SluiceError, nearest
from ctr_models.model import ModelSpec
from ctr_models.models.optinter import TREATMENTS, OptInter, OptInterConfig, Pair, Treatment
from pipelines.features.spec import Column, FeatureSpec, Hash, Vocabulary
from pipelines.training.recipes import Context, Phase, Recipe, RecipeOptions, Retrain, register_recipe, set_apart

CrossEncoding = Annotated[Vocabulary | Hash, Field(discriminator="how")]


class OptInterOptions(RecipeOptions):
    """Options of recipe ``optinter``."""

    pairs: Literal["all"] | tuple[Pair, ...] = "all"
    """Pairs that may be memorised besides those whose cross the features hold; all pairs of categorical columns."""
    encode: CrossEncoding = Vocabulary(min_count=2)
    """How the crosses made for them are encoded."""
    search_epochs: int | None = Field(None, ge=1)
    """Epochs of the search; None: as many as the retraining may take."""
    lr: float | None = Field(None, gt=0)
    """Learning rate of the pairs' logits; None: ``train.selection_lr``."""


class Cross(Phase):
    """Encodes the data with a cross for each pair that may be memorised."""

    name = "cross"

    def __init__(self, options: OptInterOptions) -> None:
        self.options = options

    def run(self, context: Context) -> Context:
        """Put the crosses that are not there yet into the features."""
        _check_model(context.model)
        spec = context.data.state.spec
        added = add_crosses(spec, self.options.pairs, self.options.encode)
        context.outputs[self.name] = {"added": [c.name for c in added]}
        if added:
            _encode(context, (*spec.columns, *added), self.name)
        return context


class Search(Phase):
    """Trains weights and treatments together."""

    name = "search"

    def __init__(self, options: OptInterOptions) -> None:
        self.options = options

    def run(self, context: Context) -> Context:
        """Train on the mixture of treatments; the noise is the gate's in slot ``interaction``."""
        from pipelines.training.fit import fit
        from pipelines.training.judging import judge_best

        train = context.config.train
        changes = {
            "epochs": self.options.search_epochs or train.epochs,
            "selection_lr": self.options.lr or train.selection_lr,
        }
        config = context.config.model_copy(update={"train": train.model_copy(update=changes)})
        trained = fit(replace(set_apart(context, self.name), config=config), context.run_dir / self.name)
        context.outputs[self.name] = {**trained, "valid": judge_best(trained)}
        return context


class Pick(Phase):
    """Gives each pair its likeliest treatment and drops the crosses that no pair memorises."""

    name = "pick"

    def run(self, context: Context) -> Context:
        """Read the best epoch's logits; judge the search's weights under them; rewrite model, features and data."""
        from pipelines.training.judging import judge_model
        from pipelines.training.trainer import read_model

        model = read_model(context, context.run_dir / context.outputs[Search.name]["weights"])
        assert isinstance(model, OptInter)
        shares = model.choices()
        # Of equal shares the dearer treatment loses: the list goes from dear to cheap.
        best: dict[Pair, Treatment] = {p: max(reversed(s), key=s.__getitem__) for p, s in shares.items()}
        by_pair = {frozenset(c.of): c.name for c in context.data.state.spec.crosses if len(c.of) == 2}
        rows = {name: context.data.state.tables[name].rows for name in by_pair.values()}
        taken = list(best.values())
        model.pick(best)
        context.outputs[self.name] = {
            "report": {
                "title": "how each pair of fields is treated",
                "rows": [
                    {
                        "pair": " x ".join(pair),
                        "treatment": best[pair],
                        **shares[pair],
                        "combinations": rows.get(by_pair.get(frozenset(pair), ""), 0),
                    }
                    for pair in sorted(best, key=lambda p: (best[p], -shares[p][best[p]]))
                ],
                "totals": {f"optinter/{treatment}": taken.count(treatment) for treatment in TREATMENTS},
            },
            "valid": judge_model(context, model),
        }
        context.model = picked_model(context.model, best)
        kept = {by_pair[frozenset(pair)] for pair, treatment in best.items() if treatment == "memorise"}
        columns = context.data.state.spec.columns
        left = tuple(c for c in columns if c.name in kept or c.name not in by_pair.values())
        if left != columns:
            _encode(context, left, self.name)
        return context


@register_recipe("optinter")
class OptInterRecipe(Recipe):
    """Crosses for the pairs that may be memorised; search; pick; retrain from fresh weights.

    Treatments and weights learn from the same training rows; which epoch's treatments are taken is decided on
    valid, as all else is. The official code decides on test. The valid rows are judged after each phase: under the
    mixture of treatments, under the pick with the same weights, and after the retraining.

    Example:
        >>> from pipelines.training.recipes import RecipeConfig, make_recipe
        >>> recipe = make_recipe(RecipeConfig(name="optinter", options={"pairs": [["user", "item"]]}))
        >>> [phase.name for phase in recipe.phases()]
        ['cross', 'search', 'pick', 'retrain']

    Source: arXiv 2108.01265.
    """

    Options = OptInterOptions
    options: OptInterOptions

    def phases(self) -> Sequence[Phase]:
        """Return the four phases."""
        return [Cross(self.options), Search(self.options), Pick(), Retrain()]


def add_crosses(
    spec: FeatureSpec, pairs: Literal["all"] | Iterable[Pair], encode: Vocabulary | Hash
) -> list[Column]:
    """Return a cross for each of the pairs that has none.

    Args:
        spec: the features so far.
        pairs: of categorical columns; ``all`` of them.
        encode: how the crosses are encoded.

    Raises:
        ConfigError: a pair names no categorical column.

    Example:
        >>> columns = [{"name": name, "kind": "categorical"} for name in ("user", "item", "hour")]
        >>> spec = FeatureSpec.model_validate({"label": "click", "columns": columns})
        >>> [cross.name for cross in add_crosses(spec, "all", Vocabulary())]
        ['user_x_item', 'user_x_hour', 'item_x_hour']
    """
    known = [c.name for c in spec.direct if c.kind == "categorical"]
    if pairs == "all":
        pairs = list(combinations(known, 2))
    there = {frozenset(c.of) for c in spec.crosses}
    taken = {*(c.name for c in spec.columns), *spec.raw_columns}
    added = []
    for pair in pairs:
        for name in pair:
            if name not in known:
                raise ConfigError(
                    f"{name!r} is no categorical column",
                    where="recipe.options.pairs",
                    remedy=nearest(name, known),
                )
        if len(set(pair)) < 2:
            raise ConfigError(
                f"the pair {list(pair)} is one column", where="recipe.options.pairs", remedy="name two"
            )
        if frozenset(pair) in there:
            continue
        there.add(frozenset(pair))
        name = _free_name("_x_".join(pair), taken)
        taken.add(name)
        added.append(Column(name=name, kind="cross", of=pair, encode=encode))
    return added


def _free_name(name: str, taken: set[str]) -> str:
    longest = 90  # a name may have 100 characters
    number, free = 2, name[:longest]
    while free in taken:
        number, free = number + 1, f"{name[:longest]}_{number}"
    return free


def picked_model(model: ModelSpec, best: dict[Pair, Treatment]) -> ModelSpec:
    """Return the model whose pairs have the treatments found; the gate that weighed them is gone."""

    def treated(wanted: Treatment) -> list[list[str]]:
        return [list(pair) for pair, treatment in best.items() if treatment == wanted]

    options: dict[str, Any] = {
        **model.options,
        "memorise": treated("memorise"),
        "factorise": treated("factorise"),
    }
    gates = {slot: gate for slot, gate in model.gates.items() if slot != "interaction"}
    return ModelSpec(name=model.name, options=options, gates=gates)


def _check_model(model: ModelSpec) -> None:
    config = model.config()
    if not isinstance(config, OptInterConfig):
        raise ConfigError(
            f"recipe 'optinter' searches for model 'optinter', not {model.name!r}",
            where="model.name",
            remedy="set model.name=optinter, or recipe.name=fit",
        )
    if not config.searches:
        raise ConfigError(
            "the treatments of the pairs are given, so there is nothing to search for",
            where="model.memorise" if config.memorise is not None else "model.factorise",
            remedy="leave memorise and factorise out, or set recipe.name=fit",
        )


def _encode(context: Context, columns: Sequence[Column], folder: str) -> None:
    """Encode the run's data with other columns, on rank 0, under the run's folder; every rank opens the result."""
    from pipelines.datasets.base import open_data
    from pipelines.features.prepare import EncodedData, prepare

    outcome: Path | SluiceError | None = None
    if context.me.first:
        config = context.config
        spec = FeatureSpec(**{**dict(context.data.state.spec), "columns": tuple(columns)})
        try:
            raw = open_data(config.data)
            workdir = context.run_dir / folder
            outcome = prepare(raw, spec, workdir=workdir, seed=config.seed, progress=context.progress).path
        except SluiceError as error:
            outcome = error
    outcome = context.me.share(outcome)
    if isinstance(outcome, SluiceError):
        raise outcome
    assert outcome is not None
    context.data = EncodedData.open(outcome)
    context.schema = context.data.schema
