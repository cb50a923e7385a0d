"""Recipe ``optfs``: search which feature values are worth their rows, decide, train again, drop the others."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ctr_models.errors import ArtifactError, ConfigError
from ctr_models.gates.base import GateSpec
from ctr_models.layers.selection import FixedSelection, SearchedSelection
from ctr_models.model import SELECTION, CTRModel, ModelSpec
from ctr_models.schema import Schema
from pipelines.features.files import atomic_write
from pipelines.training.recipes import (
    Context,
    Full,
    Phase,
    Recipe,
    RecipeOptions,
    register_recipe,
    set_apart,
)

MASKS = "masks.safetensors"


class OptFSOptions(RecipeOptions):
    """Options of recipe ``optfs``. The gate and its settings stand in ``model.gates.selection``."""

    search_epochs: int | None = Field(None, ge=1)
    """Epochs of the search, all of which are done; None: as many as the retraining may take."""
    rewind_epoch: int = Field(0, ge=0)
    """Retraining begins with the weights from the start of this epoch of the search; 0: the initial ones."""
    keep_scale: bool = True
    """Whether a kept value keeps the gate's last mask, 1 / sigmoid(s_0) for ``annealed``; false: 1."""
    lr: float | None = Field(None, gt=0)
    """Learning rate of the values' logits; None: ``train.selection_lr``."""
    full: bool = False
    """Whether the model is first trained without a selection, to be compared with in the report."""
    detect: bool = False
    """Whether a model is also trained on the dropped values alone: what it can rank by, the search has lost."""


class Unmasked(Full):
    """Trains the model without a selection, to be compared with."""

    def run(self, context: Context) -> Context:
        """Train until the epochs are over or stopping says so."""
        super().run(replace(context, model=without_selection(context.model)))
        return context


class Search(Phase):
    """Trains the model and, with it, a logit for each feature value."""

    name = "search"

    def __init__(self, options: OptFSOptions) -> None:
        self.options = options

    def run(self, context: Context) -> Context:
        """Train through all epochs of the search; which epoch is best does not matter."""
        from pipelines.training.fit import fit
        from pipelines.training.judging import judge_epoch

        train = context.config.train
        epochs = self.options.search_epochs or train.epochs
        if self.options.rewind_epoch >= epochs:
            raise ConfigError(
                f"the search has no epoch {self.options.rewind_epoch}, it has {epochs}, the first being 0",
                where="recipe.options.rewind_epoch",
                remedy=f"use 0 to {epochs - 1}",
            )
        stopping = train.stopping and train.stopping.model_copy(update={"patience": epochs + 1})
        changes = {
            "epochs": epochs,
            "stopping": stopping,
            "plateau": None,
            "averaging": None,
            "selection_lr": self.options.lr or train.selection_lr,
        }
        config = context.config.model_copy(update={"train": train.model_copy(update=changes)})
        model = searched_model(context.model)
        searching = replace(set_apart(context, self.name), config=config, model=model)
        trained = fit(searching, context.run_dir / self.name, snapshot=self.options.rewind_epoch)
        context.outputs[self.name] = {**trained, "valid": judge_epoch(trained["history"][-1])}
        return context


class Harden(Phase):
    """Decides by the last step's logits which values are kept, and takes the gate out of the model."""

    name = "harden"

    def __init__(self, options: OptFSOptions) -> None:
        self.options = options

    def run(self, context: Context) -> Context:
        """Write the masks, and judge the searched weights under them.

        Raises:
            ConfigError: the search has closed every gate.
        """
        from pipelines.training.judging import judge_model
        from pipelines.training.trainer import read_model

        searched = replace(context, model=searched_model(context.model))
        last = context.run_dir / context.outputs[Search.name]["last"]
        model = read_model(searched, last)
        assert isinstance(model.selection, SearchedSelection)
        masks = model.selection.decided()
        if not self.options.keep_scale:
            masks = {table: (mask != 0).float() for table, mask in masks.items()}
        if not any(bool(mask.any()) for mask in masks.values()):
            raise ConfigError(
                "the search has dropped every feature value",
                where="model.gates.selection",
                remedy="lower the gate's penalty, or search for fewer epochs",
            )
        if context.me.first:
            atomic_write(context.run_dir / self.name / MASKS, save(masks))
        context.me.wait()
        context.model = without_selection(context.model)
        context.outputs[self.name] = {
            "kept": {table: int((mask != 0).sum()) for table, mask in masks.items()},
            "valid": judge_model(context, masked_model(context, masks, last)),
        }
        return context


class Retrain(Phase):
    """Trains the rewound weights under the decided masks."""

    name = "retrain"

    def run(self, context: Context) -> Context:
        """Train until the epochs are over or stopping says so."""
        from pipelines.training.fit import fit
        from pipelines.training.judging import judge_best

        masks = read_masks(context.run_dir)
        snapshot = context.run_dir / context.outputs[Search.name]["snapshot"]

        def begin(model: CTRModel) -> None:
            model.select(FixedSelection(model.schema, masks))
            rewind(model, snapshot)

        trained = fit(context, context.run_dir / self.name, begin=begin)
        context.outputs[self.name] = {**trained, "valid": judge_best(trained)}
        return context


class Detect(Phase):
    """Trains a detector: the same model on nothing but the dropped values. It should rank by chance, AUC 0.5."""

    name = "detect"

    def run(self, context: Context) -> Context:
        """Train until the epochs are over or stopping says so; only the detector's valid metrics are kept."""
        from pipelines.training.fit import fit
        from pipelines.training.judging import judge_best

        masks = {table: (mask == 0).float() for table, mask in read_masks(context.run_dir).items()}
        # Rows 0 and 1 stand for no value and for values never trained on: a detector could only tell that they are.
        for mask in masks.values():
            mask[:2] = 0
        ids = context.schema.only([f.name for f in (*context.schema.sparse, *context.schema.sequences)])

        def begin(model: CTRModel) -> None:
            model.select(FixedSelection(ids, masks))

        trained = fit(replace(set_apart(context, self.name), schema=ids), context.run_dir / self.name, begin=begin)
        context.outputs[self.name] = {"valid": judge_best(trained)}
        return context


class Remove(Phase):
    """Rewrites features, data and weights: values that are dropped take no rows, and every score stays."""

    name = "remove"

    def run(self, context: Context) -> Context:
        """Fold the masks into the rows and gather those that are kept."""
        from pipelines.features.dropping import drop_values
        from pipelines.features.prepare import EncodedData
        from pipelines.training.checkpoint import save as save_checkpoint
        from pipelines.training.judging import judge_model

        masks = read_masks(context.run_dir)
        trained = context.outputs[Retrain.name]
        model = masked_model(context, masks, context.run_dir / trained["weights"])
        dropped = {table: (mask == 0).numpy() for table, mask in masks.items()}
        folder = context.run_dir / self.name / "features"
        if context.me.first:
            shutil.rmtree(folder.parent, ignore_errors=True)  # what a killed run has left half written
            drop_values(context.data, dropped, folder)
        context.me.wait()
        before, context.data = context.data.state, EncodedData.open(folder)
        moves = {table: torch.from_numpy(before.tables[table].moves(gone)) for table, gone in dropped.items()}
        context.schema = smaller(
            context.schema, {table: one.rows for table, one in context.data.schema.tables.items()}
        )
        small = without_values(model, context.model.build(context.schema), moves)
        own = {f"model/{name}": tensor for name, tensor in small.state_dict().items()}
        target = context.run_dir / self.name / "weights"
        save_checkpoint(target, own, {"from": trained["weights"]}, context.me)
        context.outputs[self.name] = {
            **trained,
            "weights": target.relative_to(context.run_dir).as_posix(),
            "report": report(masks, context.schema),
            "valid": judge_model(context, small),
        }
        return context


@register_recipe("optfs")
class OptFSRecipe(Recipe):
    """Search, harden, rewind and retrain, remove; over any model that embeds its features.

    The gate in slot ``selection``, ``annealed`` unless the model names another, masks each feature value v by its
    logit s_v. For ``annealed``: g_v = sigmoid(t s_v) / sigmoid(s_0), while t grows. To the loss of each step is
    added penalty * sum over v of sigmoid(t s_v), where v runs over all rows of all tables, whether or not they are
    in the batch, rows 0 and 1 (missing, unknown) included, and each table counts once however many fields share it.
    Then v is kept if s_v > 0. All weights of the model (not only embeddings, layers and batch normalisation) return
    to what they were at the start of ``rewind_epoch``; they are trained again under the decided masks. At the end
    the masks are folded into the rows and the rows of dropped values are removed: in each table these values share
    one row of zeros, so that a dropped, a missing and an unknown value each score as they did under the masks.

    The valid rows are judged after each phase, since a pruned model may rank well and be badly calibrated: after
    the last epoch of the search, under masks between 0 and 1; with the same weights under the masks decided; after
    the retraining; after the removal. With ``detect`` a model is also trained on the dropped values alone, which
    ranks by chance if the search has lost nothing (the detector of arXiv 2407.19308, here a check, not a penalty).

    Differences from the official code: the linear term is masked with the rest; t grows with every step; the
    pruned rows are really gone; the masks hold for every model.

    Example:
        >>> from pipelines.training.recipes import RecipeConfig, make_recipe
        >>> recipe = make_recipe(RecipeConfig(name="optfs", options={"search_epochs": 10}))
        >>> [phase.name for phase in recipe.phases()]
        ['search', 'harden', 'retrain', 'remove']

    Source: arXiv 2301.10909.
    """

    Options = OptFSOptions
    options: OptFSOptions

    def phases(self) -> Sequence[Phase]:
        """Return the four phases, and those that are asked for, for the report alone."""
        first = [Unmasked()] if self.options.full else []
        last = [Detect(), Remove()] if self.options.detect else [Remove()]
        return [*first, Search(self.options), Harden(self.options), Retrain(), *last]


def searched_model(model: ModelSpec) -> ModelSpec:
    """Return the model with a gate in slot ``selection``, ``annealed`` unless it has one.

    Raises:
        ConfigError: its gate is ``none``.
    """
    gate = model.gates.get(SELECTION) or GateSpec.parse("annealed")
    if gate.name == "none":
        raise ConfigError(
            "gate 'none' selects nothing",
            where="model.gates.selection",
            remedy="leave it out for annealed, or set recipe.name=fit",
        )
    return ModelSpec(name=model.name, options=model.options, gates={**model.gates, SELECTION: gate})


def without_selection(model: ModelSpec) -> ModelSpec:
    """Return the model without a gate in slot ``selection``."""
    gates = {slot: gate for slot, gate in model.gates.items() if slot != SELECTION}
    return ModelSpec(name=model.name, options=model.options, gates=gates)


def masked_model(context: Context, masks: dict[str, Tensor], weights: Path) -> CTRModel:
    """Return the context's model under decided masks, with the weights of a checkpoint, in evaluation mode."""
    model = context.model.build(context.schema)
    model.select(FixedSelection(context.schema, masks))
    rewind(model, weights)
    return model.eval()


def rewind(model: CTRModel, snapshot: Path) -> None:
    """Give a model all the weights that a checkpoint holds; its selection stays.

    Raises:
        ArtifactError: the snapshot is damaged, or is another model's.
    """
    from pipelines.training.checkpoint import read_tensors, verify

    verify(snapshot)
    own = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(f"{SELECTION}.")}
    read_tensors(snapshot, {f"model/{name}": tensor for name, tensor in own.items()})


def read_masks(run_dir: Path) -> dict[str, Tensor]:
    """Return the masks that a run has decided on, by table, (rows,).

    Raises:
        ArtifactError: they are missing or damaged.
    """
    path = run_dir / Harden.name / MASKS
    try:
        return load(path.read_bytes())
    except (OSError, SafetensorError):
        raise ArtifactError(
            "the masks are missing or damaged",
            where=str(path),
            remedy=f"delete {run_dir / 'phases'} to decide again",
        ) from None


def smaller(schema: Schema, rows: dict[str, int]) -> Schema:
    """Return the schema with other table sizes."""
    return Schema(
        dense=schema.dense,
        sparse=tuple(f.model_copy(update={"rows": rows[f.table]}) for f in schema.sparse),
        sequences=tuple(f.model_copy(update={"rows": rows[f.table]}) for f in schema.sequences),
        tasks=schema.tasks,
    )


@torch.no_grad()
def without_values(masked: CTRModel, small: CTRModel, moves: dict[str, Tensor]) -> CTRModel:
    """Give a model with smaller tables the weights of a masked one, so that both score alike.

    Args:
        masked: with a :class:`FixedSelection`.
        small: the same model without it, its tables as small as ``moves`` makes them.
        moves: the row in ``small`` of each row in ``masked``, by table, (rows,).

    Returns:
        ``small``, in evaluation mode.
    """
    from pipelines.training.optimizers import embeddings, table_parameters

    assert isinstance(masked.selection, FixedSelection)
    masks = masked.selection.masks()
    tables = set(table_parameters(masked))
    rest = {
        name: tensor
        for name, tensor in masked.state_dict().items()
        if name not in tables and not name.startswith(f"{SELECTION}.")
    }
    left = small.load_state_dict(rest, strict=False)
    assert not left.unexpected_keys
    assert set(left.missing_keys) == set(table_parameters(small))
    for old, new in zip(embeddings(masked), embeddings(small), strict=True):
        weights = new.tables()
        for table, weight in old.tables().items():
            kept = masks[table] != 0
            weights[table].zero_()
            weights[table][moves[table][kept].long()] = weight[kept] * masks[table][kept].unsqueeze(1)
    return small.eval()


def report(masks: dict[str, Tensor], schema: Schema) -> dict[str, Any]:
    """Return what was dropped, table by table and in all. Values are the rows but those of missing and unknown."""
    rows = []
    for table, f in sorted(schema.tables.items()):
        mask = masks[table]
        rows.append(_row(table, len(mask) - 2, int((mask[2:] == 0).sum()), len(mask), f.rows))
    sums = [sum(row[key] for row in rows) for key in ("values", "dropped", "rows before", "rows after")]
    total = _row("(all)", *sums)
    totals = {f"optfs/{key.replace(' ', '_')}": total[key] for key in total if key != "table"}
    return {"title": "dropped feature values", "rows": [*rows, total], "totals": totals}


def _row(table: str, values: int, dropped: int, before: int, after: int) -> dict[str, Any]:
    share = dropped / values if values else 0.0
    return {
        "table": table,
        "values": values,
        "dropped": dropped,
        "share dropped": share,
        "rows before": before,
        "rows after": after,
    }
