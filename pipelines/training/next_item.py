"""Recipe ``next_item``: train a model to rank the item that comes next above all others."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl
import torch
from pydantic import BaseModel, ConfigDict, Field
from scipy import sparse

from ctr_models.errors import ConfigError
from ctr_models.layers.transitions import TransitionDistillation
from ctr_models.model import MODELS, CTRModel
from ctr_models.next_item import FIRST_ITEM, NextItemLoss, NextItemModel
from pipelines.evaluation.ranking import Rankings, target_ranks
from pipelines.features.prepare import EncodedData
from pipelines.training.judging import judge_best
from pipelines.training.loader import Loader
from pipelines.training.recipes import Context, Judge, Phase, Recipe, RecipeOptions, register_recipe

MONITORED = ("ndcg_10", "hr_10")
SCORES = 2_000_000
"""Scores that are computed at a time in evaluation; 8 MB."""


class DistillationConfig(BaseModel):
    """TED: which item follows which, distilled into the items' vectors."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    weight: float = Field(0.1, gt=0)
    """Of this loss beside the cross-entropy of the next item."""
    temperature: float = Field(0.1, gt=0)
    """Against n other items a certain successor has the teacher's mass 1 / (1 + n exp(-1 / temperature))."""
    span: int = Field(1, ge=1)
    """Items within so many steps count as followers."""


class NextItemOptions(RecipeOptions):
    """Options of recipe ``next_item``."""

    distillation: DistillationConfig | None = None


class FitNextItem(Phase):
    """Trains by the next item instead of clicks; outputs as phase ``fit`` of recipe ``fit``."""

    name = "fit"

    def __init__(self, options: NextItemOptions) -> None:
        self.options = options

    def run(self, context: Context) -> Context:
        """Train until the epochs are over or stopping says so.

        Raises:
            ConfigError: the model, or a setting of ``train``, does not rank.
        """
        from pipelines.training.fit import fit

        check_ranking(context)

        def begin(model: CTRModel) -> None:
            assert isinstance(model, NextItemModel)
            own = self.options.distillation
            if own is None:
                model.objective = NextItemLoss()
                return
            counts = training_transitions(context.data, model, span=own.span)
            model.objective = NextItemLoss(
                TransitionDistillation(
                    counts.indptr,
                    counts.indices,
                    counts.data,
                    temperature=own.temperature,
                    dropout=model.config.encoder.dropout,
                ),
                own.weight,
            )

        trained = fit(context, context.run_dir / self.name, begin=begin)
        context.outputs[self.name] = {**trained, "valid": judge_best(trained)}
        return context


@register_recipe("next_item")
class NextItemRecipe(Recipe):
    """One phase: softmax over all items at every place of every training history, judged by full ranking.

        loss = mean over places of -log softmax_j(<u_t, e_j>)[next] + weight * distillation

    A training row is a user's sequence: its history, then its item. Missing and unknown values are ranked neither
    in training nor in evaluation. The item of a valid or test row is ranked among all items outside the whole
    history of the row, also that part of it which the model doesn't look at. Metrics are ``hr_5`` to ``ndcg_20``;
    by ``ndcg_10``, or ``hr_10``, the epoch is chosen.

    For ``sasrec`` and ``mqsa_ted`` without linear term, in one process, with dense tables.

    Example:
        >>> from pipelines.training.recipes import RecipeConfig, make_recipe
        >>> recipe = make_recipe(RecipeConfig(name="next_item", options={"distillation": {"weight": 0.1}}))
        >>> [phase.name for phase in recipe.phases()]
        ['fit']

    Source: arXiv 2311.01056.
    """

    Options = NextItemOptions
    options: NextItemOptions

    def phases(self) -> Sequence[Phase]:
        """Return the one phase."""
        return [FitNextItem(self.options)]

    def judge(self) -> Judge:
        """Return :func:`rank_split`."""
        return rank_split


def check_ranking(context: Context) -> None:
    """Refuse, before any work, what can't rank or be ranked by.

    Raises:
        ConfigError: naming the key and the remedy.
    """
    train = context.config.train
    rankers = sorted(name for name in MODELS if issubclass(MODELS[name], NextItemModel))
    if not issubclass(MODELS[context.model.name], NextItemModel):
        raise ConfigError(
            f"{context.model.name!r} does not rank items", where="model.name", remedy=f"one of {rankers}"
        )
    model = context.model.build(context.schema)
    assert isinstance(model, NextItemModel)
    if not hasattr(model, "encoder"):
        raise ConfigError(
            "no feature is a history",
            where="features",
            remedy="give a sequence that has the item's table and target",
        )
    if not model.ranks:
        raise ConfigError(
            "a linear term would stand beside the ranking", where="model.linear", remedy="set it to false"
        )
    if train.embedding.backend != "dense":
        raise ConfigError(
            "the softmax over all items needs whole tables",
            where="train.embedding.backend",
            remedy="set it to dense",
        )
    if context.me.world > 1:
        raise ConfigError(
            "next_item trains in one process", where="recipe.name", remedy="start it without torchrun"
        )
    if train.stopping is not None and train.stopping.monitor not in MONITORED:
        raise ConfigError(
            f"recipe next_item has no {train.stopping.monitor}",
            where="train.stopping.monitor",
            remedy=f"one of {list(MONITORED)}",
        )
    if train.slices:
        raise ConfigError("rankings are not reported by slices", where="train.slices", remedy="leave it out")


def training_transitions(data: EncodedData, model: NextItemModel, *, span: int) -> sparse.csr_array:
    """Count what followed what in the training rows' sequences, each a whole history and its item."""
    columns = data.frame("train").select(pl.col(model.history).list.concat(pl.col(model.item))).collect()
    lists = columns[model.history]
    lengths = lists.list.len().to_numpy()
    return count_transitions(
        lists.explode().to_numpy().astype(np.int64) - FIRST_ITEM,
        np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]),
        items=len(model.items()),
        span=span,
    )


def count_transitions(values: np.ndarray, offsets: np.ndarray, *, items: int, span: int = 1) -> sparse.csr_array:
    """Return C, (N, N): how often item j came within ``span`` steps after item i. It holds non-zero counts only.

    Args:
        values: items of all sequences, (T,) integers; negative for what is no item.
        offsets: where each sequence begins, and T at the end, (B + 1,).
        items: N.
        span: steps.

    Example:
        >>> count_transitions(np.array([0, 1, 2, 0, 1]), np.array([0, 3, 5]), items=3).toarray().tolist()
        [[0, 2, 0], [0, 0, 1], [0, 0, 0]]
    """
    rows = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    before, after = [], []
    for step in range(1, span + 1):
        first, second = values[:-step], values[step:]
        together = (rows[:-step] == rows[step:]) & (first >= 0) & (second >= 0)
        before.append(first[together])
        after.append(second[together])
    pairs = np.concatenate(before), np.concatenate(after)
    counts = sparse.coo_array((np.ones(len(pairs[0]), dtype=np.int64), pairs), shape=(items, items)).tocsr()
    counts.sum_duplicates()
    return counts


@torch.no_grad()
def rank_split(model: CTRModel, data: EncodedData, split: str, batch_size: int) -> Rankings:
    """Rank the item of each row among all items that its user hasn't seen.

    Args:
        model: a next-item model; is left in evaluation mode.
        data: encoded with the model's features.
        split: ``train``, ``valid`` or ``test``.
        batch_size: most rows at a time; bounds the memory, not the result.
    """
    assert isinstance(model, NextItemModel)
    model.eval()
    items = model.items()
    size = max(1, min(batch_size, SCORES // len(items)))
    found = []
    for batch in Loader(data.files(split), model.schema, batch_size=size):
        batch = batch.to(items.device)
        history = batch.sequences[model.history]
        seen = history.values().long() - FIRST_ITEM
        rows = torch.repeat_interleave(history.lengths().long())
        real = seen >= 0
        target = batch.sparse[model.item].values().long() - FIRST_ITEM
        found.append(target_ranks(model.users(batch) @ items.T, target, seen[real], rows[real]).cpu())
    columns = data.frame(split).select("__user__", "__row__").collect()
    return Rankings(torch.cat(found).numpy(), columns["__user__"].to_numpy(), columns["__row__"].to_numpy())
