"""Recipe ``fdo``: train, measure how many dimensions each table uses, train again with as many."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from ctr_models.errors import ConfigError
from ctr_models.model import CTRModel, ModelSpec
from ctr_models.schema import IdField, Schema
from pipelines.training.recipes import Context, Full, Phase, Recipe, RecipeOptions, Retrain, register_recipe

if TYPE_CHECKING:
    from pipelines.training.config import TrainConfig

FUSED_MULTIPLE = 4


class FDOOptions(RecipeOptions):
    """Options of recipe ``fdo``."""

    keep: float = Field(0.95, gt=0, le=1)
    """rho: the share of a table's variance that its dimensions must explain."""
    align: Literal["auto", "always", "never"] = "auto"
    """Whether a linear layer takes each table's shorter rows back to the common dimension. ``auto``: where the
    model needs fields of one dimension."""
    start: Literal["fresh", "projected"] = "fresh"
    """Retrain from fresh weights, as published, or from those of the full model, whose tables are cut down to their
    first components. That needs ``align: always``: the model above must keep its shape."""

    @model_validator(mode="after")
    def _shape_is_kept(self) -> FDOOptions:
        if self.start == "projected" and self.align != "always":
            raise ValueError("start: projected needs align: always, so that the model keeps its shape")
        return self


class FullTables(Full):
    """Trains the model with the dimensions that the features give."""

    def run(self, context: Context) -> Context:
        """Train until the epochs are over or stopping says so."""
        main_tables(context.model.build(_small(context.schema)))  # refused before the time is spent
        return super().run(context)


class Choose(Phase):
    """Gives each table the dimensions that it uses."""

    name = "choose"

    def __init__(self, options: FDOOptions) -> None:
        self.options = options

    def run(self, context: Context) -> Context:
        """Read the best epoch's tables; rewrite the inputs' dimensions; judge the model on what they keep."""
        from pipelines.training.judging import judge_model
        from pipelines.training.trainer import read_model

        model = read_model(context, context.run_dir / context.outputs[Full.name]["weights"])
        dims, rows = {}, []
        for table, weight in main_tables(model).items():
            seen = context.data.state.counts(table) > 0
            explained = explained_variance(weight, seen)
            dims[table] = choose_dim(explained, self.options.keep, multiple=_multiple(context.config.train))
            share = float(explained[dims[table] - 1])
            rows.append(_row(table, len(weight), weight.shape[1], dims[table], share))
            weight.copy_(projected(weight, seen, dims[table]))
        sums = [sum(row[key] for row in rows) for key in ("rows", "weights before", "weights after")]
        total = {"table": "(all)", "rows": sums[0], "dim before": sums[1] / sums[0], "dim after": sums[2] / sums[0]}
        total |= {"variance": "", "weights before": sums[1], "weights after": sums[2]}
        given = context.schema
        context.schema = with_dims(context.model, given, dims, self.options.align)
        context.outputs[self.name] = {
            "dims": dims,
            "given": given.model_dump(mode="json"),
            "report": {
                "title": "dimensions by the variance that they explain",
                "rows": [*rows, total],
                "totals": {"fdo/weights_before": sums[1], "fdo/weights_after": sums[2]},
            },
            "valid": judge_model(context, model),
        }
        return context


class RetrainCut(Retrain):
    """Trains the model anew with the dimensions that were chosen."""

    def __init__(self, options: FDOOptions) -> None:
        self.options = options

    def begin(self, context: Context) -> Callable[[CTRModel], None] | None:
        """Return what gives the model the full one's weights, its tables cut down; None: it starts afresh."""
        if self.options.start == "fresh":
            return None
        from pipelines.training.trainer import read_model

        given = Schema.model_validate(context.outputs[Choose.name]["given"])
        full = read_model(replace(context, schema=given), context.run_dir / context.outputs[Full.name]["weights"])
        return lambda model: start_projected(model, full, context.data.state.counts)


@register_recipe("fdo")
class FDORecipe(Recipe):
    """Field-level dimension optimisation: train; principal components of each table; retrain.

    A table's dimension becomes the smallest k for which the first k of its d principal components explain the share
    ``keep`` of its variance: sum_{i <= k} s_i^2 >= keep * sum_i s_i^2, s_i being the singular values of its rows
    minus their mean. Rows that no training row holds, such as an unused row of missing values, were never learned
    and are left out. A table that several fields share is one table. With fused tables k is rounded up to a
    multiple of 4. Numbers, whose table is a single vector, keep their dimension.

    The valid rows are judged after each phase; after the choice, under the full model whose tables are cut down to
    their first k components.

    The official code and its description differ on squares; this goes by explained variance, as the code does.
    ``start: projected`` is ours.

    Example:
        >>> from pipelines.training.recipes import RecipeConfig, make_recipe
        >>> recipe = make_recipe(RecipeConfig(name="fdo", options={"keep": 0.9}))
        >>> [phase.name for phase in recipe.phases()]
        ['full', 'choose', 'retrain']

    Source: arXiv 2311.04635.
    """

    Options = FDOOptions
    options: FDOOptions

    def phases(self) -> Sequence[Phase]:
        """Return the three phases."""
        return [FullTables(), Choose(self.options), RetrainCut(self.options)]


def main_tables(model: CTRModel) -> dict[str, Tensor]:
    """Return the tables of the model's own embedding, not those of its linear term or its gates, (rows, d).

    Raises:
        ConfigError: it has none.
    """
    from pipelines.training.optimizers import embeddings

    found = {t: w.detach() for e in embeddings(model) if not e.prefix for t, w in e.tables().items()}
    if not found:
        raise ConfigError(
            f"model {model.name!r} has no embedding tables whose dimension could be chosen",
            where="recipe.name",
            remedy="choose another model, or set recipe.name=fit",
        )
    return found


def explained_variance(table: Tensor, seen: np.ndarray) -> Tensor:
    """Return the share of the variance that the first 1, 2, ... d principal components explain, (d,) float64.

    Args:
        table: (rows, d).
        seen: (rows,) bool; the rows that count. Of fewer than two, or equal ones, one component explains all.

    Example:
        >>> table = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 1.0], [2.0, 1.0]])
        >>> explained_variance(table, np.ones(4, dtype=bool))
        tensor([0.8000, 1.0000], dtype=torch.float64)
    """
    _, squares, _ = _components(table, seen)
    if squares.sum() == 0:
        return torch.ones_like(squares)
    return squares.cumsum(0) / squares.sum()


def projected(table: Tensor, seen: np.ndarray, dim: int) -> Tensor:
    """Return the table whose rows are cut down to the first principal components of those that count, (rows, d).

    Args:
        table: (rows, d).
        seen: (rows,) bool; the rows that count.
        dim: how many components are kept.

    Example:
        >>> table = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 1.0], [2.0, 1.0]])
        >>> projected(table, np.ones(4, dtype=bool), 1)
        tensor([[0.0000, 0.5000],
                [2.0000, 0.5000],
                [0.0000, 0.5000],
                [2.0000, 0.5000]])
    """
    mean, _, axes = _components(table, seen)
    kept = axes[:, :dim]
    return (mean + (table.double() - mean) @ kept @ kept.T).to(table.dtype)


@torch.no_grad()
def start_projected(model: CTRModel, full: CTRModel, counts: Callable[[str], np.ndarray]) -> None:
    """Give a model with aligned tables the weights of the full one: table E becomes E V, and its alignment V'.

    V (d, k) are the first components of the rows that count. What of the tables' mean lies outside of them is lost.

    Args:
        model: with tables of k dimensions, aligned to d.
        full: the same with tables of d dimensions.
        counts: how often training has seen each row of a table.
    """
    from pipelines.training.optimizers import embeddings

    own, others = model.state_dict(), full.state_dict()
    changed = set()
    for cut, whole in zip(embeddings(model), embeddings(full), strict=True):
        if cut.prefix:
            continue
        for table, short in cut.tables().items():
            long = whole.tables()[table].detach()
            if short.shape == long.shape:
                continue
            axes = _components(long, counts(table) > 0)[2][:, : short.shape[1]].to(long.dtype)  # (d, k)
            short.copy_(long @ axes)
            cut.align.tables[table].weight.copy_(axes)
            changed |= {short.data_ptr(), cut.align.tables[table].weight.data_ptr()}
    for name, tensor in own.items():
        if tensor.data_ptr() not in changed or not tensor.numel():
            tensor.copy_(others[name])


def _components(table: Tensor, seen: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean (d,), squared singular values (d,), largest first, and axes (d, d) of the rows that count."""
    rows = table[torch.from_numpy(seen)].double()
    mean = rows.mean(0) if len(rows) else rows.new_zeros(rows.shape[1])
    centred = rows - mean
    # From a matrix that stays small however long the table.
    squares, axes = torch.linalg.eigh(centred.T @ centred)
    return mean, squares.flip(0).clamp_min(0.0), axes.flip(1)


def choose_dim(explained: Tensor, keep: float, *, multiple: int = 1) -> int:
    """Return the smallest dimension that explains the share ``keep``, rounded up to a multiple.

    Args:
        explained: by 1, 2, ... d components, (d,).
        keep: rho.
        multiple: 4 for fused tables; the result is at most d.

    Example:
        >>> choose_dim(torch.tensor([0.5, 0.9, 0.99, 1.0, 1.0]), 0.9), choose_dim(torch.tensor([0.5, 1.0]), 1.0)
        (2, 2)
    """
    k = 1 + int((explained < keep - 1e-9).sum())
    return min(-(-k // multiple) * multiple, len(explained))


def with_dims(model: ModelSpec, schema: Schema, dims: Mapping[str, int], align: str) -> Schema:
    """Return the schema with these dimensions by table, aligned to the old ones where that is wanted or needed.

    Raises:
        ConfigError: alignment is needed, and not wanted.
    """
    short = _changed(schema, {table: {"dim": dim} for table, dim in dims.items()})
    if align != "always":
        try:
            model.build(_small(short))
            return short
        except ConfigError as error:
            if align == "never":
                raise ConfigError(
                    error.problem, where="recipe.options.align", remedy="set it to auto, or choose another model"
                ) from None
    old = schema.tables
    return _changed(schema, {table: {"rank": dim} for table, dim in dims.items() if dim < old[table].dim})


def _changed(schema: Schema, changes: Mapping[str, dict[str, int]]) -> Schema:
    def changed(fields: tuple[IdField, ...]) -> tuple[IdField, ...]:
        return tuple(f.model_copy(update=changes.get(f.table, {})) for f in fields)

    return Schema(
        dense=schema.dense, sparse=changed(schema.sparse), sequences=changed(schema.sequences), tasks=schema.tasks
    )


def _small(schema: Schema) -> Schema:
    """Return the schema with tables of two rows: whether a model takes it does not depend on them."""
    return _changed(schema, {table: {"rows": 2} for table in schema.tables})


def _multiple(train: TrainConfig) -> int:
    return FUSED_MULTIPLE if train.embedding.backend == "fused" else 1


def _row(table: str, rows: int, dim: int, chosen: int, share: float) -> dict[str, Any]:
    return {
        "table": table,
        "rows": rows,
        "dim before": dim,
        "dim after": chosen,
        "variance": share,
        "weights before": rows * dim,
        "weights after": rows * chosen,
    }
