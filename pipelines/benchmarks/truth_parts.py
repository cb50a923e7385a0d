"""What ``sluice bench truth`` trains and what it asks of each training: one part for each planted world.

The settings below were chosen on the worlds of seeds 1 and 2; the command reports on others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines.benchmarks import truth_measures as measure
from pipelines.config import RunConfig, parse_config
from pipelines.datasets.base import DATASETS, check_options
from pipelines.datasets.planted_orders import PlantedOrders
from pipelines.datasets.planted_populations import POPULATION
from pipelines.datasets.planted_shortcut import DISAGREES
from pipelines.datasets.planted_values import PlantedValues
from pipelines.evaluation.metrics import auc
from pipelines.features.prepare import EncodedData
from pipelines.training.predict import predict
from pipelines.training.trainer import TrainResult

Figures = dict[str, float]
Tree = dict[str, Any]

ORDERS = (2, 3, 4, 5)
"""Orders of the worlds of part ``orders``; the network's layers reach all of them in each."""
_ORDER_FIELDS = 8
_ORDER_EPOCHS = {2: 3, 3: 5, 4: 8, 5: 12}


@dataclass(frozen=True)
class Part:
    """One question about gates.

    Args:
        arms: by name, the configuration without its seed.
        measure: what a training has found; the same figures for every training of an arm.
        paired: figures whose difference to the first arm, seed by seed, is reported too.
        shown: figures that stand in the table too; all of them by default.
    """

    arms: Mapping[str, Tree]
    measure: Callable[[RunConfig, EncodedData, TrainResult], Figures]
    paired: tuple[str, ...] = ()
    shown: tuple[str, ...] = ()

    def config(self, arm: str, seed: int, rows: int | None) -> RunConfig:
        """Return the configuration of one training: world and training have the same seed."""
        tree = self.arms[arm]
        options = {**tree["data"].get("options", {}), "seed": seed, **({"rows": rows} if rows else {})}
        data = {**tree["data"], "options": options}
        return parse_config({**tree, "data": data, "seed": seed, "tracking": {"enabled": False}})


def _train(epochs: int, lr: float, **more: Any) -> Tree:
    embedding = {"backend": "dense", "l2": more.pop("embedding_l2", 0.0)}
    optimizer = {"lr": lr, "l2": more.pop("l2", 0.0)}
    base = {"batch_size": 512, "threads": 1, "plateau": None, "stopping": {"patience": epochs}}
    return {"epochs": epochs, "optimizer": optimizer, "embedding": embedding, **base, **more}


def _values_arm(gate: Tree | None, lr: float = 0.002) -> Tree:
    searched: Tree = {"recipe": {"name": "optfs", "options": {"lr": lr}}} if gate else {}
    return {
        "data": {"source": "planted_values", "options": {"rows": 160_000}},
        "model": {"name": "fm", "embedding_std": 0.03, "gates": {"selection": gate} if gate else {}},
        "train": _train(6, 0.01, embedding_l2=1e-4, stopping={"patience": 1}),
        **searched,
    }


def _values(config: RunConfig, data: EncodedData, trained: TrainResult) -> Figures:
    from pipelines.training.optfs import read_masks

    figures = {"auc": trained.metrics["test_auc"]}
    if config.recipe.name == "optfs":
        world = _world(config)
        assert isinstance(world, PlantedValues)
        masks = read_masks(trained.run_dir)
        figures["recall"], figures["false_drops"] = measure.dropped_values(
            data.state, masks, world.useless_values()
        )
    return figures


def _orders_arm(order: int) -> Tree:
    options = {"rows": 100_000 if order == 5 else 60_000, "orders": [order], "idle": _ORDER_FIELDS - order}
    return {
        "data": {"source": "planted_orders", "options": {**options, "strength": 2.0}},
        "model": {"name": "gdcn", "form": "cross_only", "cross_layers": max(ORDERS) - 1, "embedding_std": 0.3},
        "train": _train(_ORDER_EPOCHS[order], 0.005 if order == 5 else 0.003),
    }


def _orders(config: RunConfig, data: EncodedData, trained: TrainResult) -> Figures:
    from ctr_models.models.gdcn import GDCN

    world, model = _world(config), trained.model
    assert isinstance(world, PlantedOrders)
    assert isinstance(model, GDCN)
    (order,) = world.options.orders
    batch = measure.whole_split(data, "test")
    # The fields of the world's product come first: the first j of them, and j > order with idle ones, don't act.
    products = measure.products_of(data.state, batch, world.signs(), world.fields()[: max(ORDERS)])
    opening = dict(zip(range(2, max(ORDERS) + 1), measure.openings(model, batch, products), strict=True))
    layers = dict(enumerate(measure.auc_by_layers(model, batch), start=1))
    means = model.openness(batch)
    active, idle = world.products()[order], world.fields()[order:]
    return {
        "auc": trained.metrics["test_auc"],
        "told": float(max(opening, key=lambda j: opening[j]) == order),
        "opening": opening[order],
        "absent": max(value for j, value in opening.items() if j != order),
        **{f"opening_{j}": value for j, value in opening.items()},
        **{f"auc_up_to_{j}": value for j, value in layers.items()},
        **{f"mean_gate_{j}": float(np.mean(list(means[j].values()))) for j in means},
        "fields_gate": _mean_gate(means, active) - _mean_gate(means, idle),
    }


def _mean_gate(means: dict[int, dict[str, float]], fields: list[str]) -> float:
    return float(np.mean([of[field] for of in means.values() for field in fields]))


def _populations_arm(told_by: str, gate: Tree, hidden: int = 2) -> Tree:
    options: Tree = {"rows": 60_000, "told_by": told_by}
    if told_by == "history":
        options |= {"rows": 40_000, "users": 4_000, "items": 40, "history": 6, "typical": 0.9}
    model = {"embedding_std": 0.1, "experts": 4, "expert": {"hidden": [hidden]}, "contrast": {"weight": 0.0}}
    return {
        "data": {"source": "planted_populations", "options": options},
        "model": {"name": "aw_moe", **model, "gates": {"expert": gate}},
        "train": _train(6, 0.01),
    }


def _populations(config: RunConfig, data: EncodedData, trained: TrainResult) -> Figures:
    from ctr_models.models.aw_moe import AWMoE

    assert isinstance(trained.model, AWMoE)
    weights = trained.model.expert_weights(measure.whole_split(data, "test"))
    population = data.frame("test").select(POPULATION).collect()[POPULATION].to_numpy()
    nmi = measure.normalized_mutual_information(weights.argmax(1).numpy(), population)
    return {"auc": trained.metrics["test_auc"], "nmi": nmi}


def _shortcut_arm(model: Tree) -> Tree:
    return {
        "data": {"source": "planted_shortcut", "options": {"rows": 80_000, "hard": 2}},
        "model": {"embedding_std": 0.1, **model},
        "train": _train(4, 0.001),
    }


def _shortcut(config: RunConfig, data: EncodedData, trained: TrainResult) -> Figures:
    assert data.truth is not None
    found = predict(trained.model, data, "test")
    frame = data.frame("test").select(DISAGREES, data.truth).collect()
    there, truth = frame[DISAGREES].to_numpy(), frame[data.truth].to_numpy()
    return {
        "auc": trained.metrics["test_auc"],
        "auc_disagrees": float(auc(found.label[there], found.probability[there])),
        "best_disagrees": float(auc(found.label[there], truth[there])),
    }


def _world(config: RunConfig) -> Any:
    return DATASETS[config.data.source](check_options(config.data))


_TOWER: Tree = {"mlp": {"hidden": [64, 32]}}

PARTS: dict[str, Part] = {
    "optfs": Part(
        {
            "annealed": _values_arm({"name": "annealed", "penalty": 9e-5}),
            "hard_concrete": _values_arm({"name": "hard_concrete", "penalty": 9e-5}, lr=0.02),
            "gumbel": _values_arm({"name": "gumbel", "penalty": 5e-5}, lr=0.01),
            "none": _values_arm(None),
        },
        _values,
    ),
    "orders": Part(
        {f"order_{order}": _orders_arm(order) for order in ORDERS},
        _orders,
        shown=("auc", "best_possible_auc", "told", "opening", "absent", "fields_gate"),
    ),
    "experts": Part(
        {
            "attention_weighted": _populations_arm("history", {"name": "attention_weighted"}, hidden=4),
            "softmax": _populations_arm("history", {"name": "softmax", "temperature": 0.2}),
            "topk": _populations_arm("history", {"name": "topk", "temperature": 0.2}),
            "comet": _populations_arm("history", {"name": "comet"}),
            "features_softmax": _populations_arm("features", {"name": "softmax", "temperature": 0.3}),
            "features_topk": _populations_arm("features", {"name": "topk", "temperature": 0.3}),
            "features_comet": _populations_arm("features", {"name": "comet"}),
        },
        _populations,
    ),
    "shortcuts": Part(
        {
            "none": _shortcut_arm({"name": "dnn", **_TOWER}),
            "feature_sigmoid2": _shortcut_arm({"name": "dnn", **_TOWER, "gates": {"feature": "sigmoid2"}}),
            "field_squeeze_excite": _shortcut_arm({"name": "dnn", **_TOWER, "gates": {"field": "squeeze_excite"}}),
            "field_mixer": _shortcut_arm({"name": "dnn", **_TOWER, "gates": {"field": "mixer"}}),
            "feature_swiglu": _shortcut_arm({"name": "dnn", **_TOWER, "gates": {"feature": "swiglu"}}),
        },
        _shortcut,
        paired=("auc", "auc_disagrees"),
    ),
}
