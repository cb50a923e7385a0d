"""Pictures of what gates have found of a planted truth, one a part. Each takes the figures by arm and world."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from pipelines.benchmarks.truth_measures import interval
from pipelines.evaluation.plots import COLOURS, INK, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Found = Mapping[str, Sequence[Mapping[str, float]]]
"""Of each arm, the figures of its trainings."""


def values_plot(found: Found) -> Figure:
    """Draw which share of the useless and of the useful values each selection gate drops."""
    figure = _figure(6.4, 2.8)
    axes = figure.subplots()
    arms = [arm for arm in found if "recall" in found[arm][0]]
    for offset, (key, label, colour) in enumerate(
        (("recall", "useless values", COLOURS[0]), ("false_drops", "useful values", COLOURS[1]))
    ):
        _dots(axes, [[f[key] for f in found[arm]] for arm in arms], colour, label, shift=0.2 * offset - 0.1)
    _named(axes, arms)
    axes.set(ylabel="share dropped", ylim=(-0.04, 1.04))
    axes.axhline(0.95, color=COLOURS[0], linewidth=0.8, linestyle=(0, (4, 3)))
    axes.axhline(0.01, color=COLOURS[1], linewidth=0.8, linestyle=(0, (4, 3)))
    tidy(axes)
    axes.legend(loc="center left", frameon=False, fontsize=8, labelcolor=INK)
    return figure


def orders_plot(found: Found) -> Figure:
    """Draw how wide gates open for products of each order, and the AUC with the gates of high layers closed."""
    figure = _figure(7.6, 3.2)
    left, right = figure.subplots(1, 2)
    arms = list(found)
    tested = [int(key.removeprefix("opening_")) for key in found[arms[0]][0] if key.startswith("opening_")]
    means = np.array([[np.mean([f[f"opening_{j}"] for f in found[arm]]) for j in tested] for arm in arms])
    left.imshow(means, cmap="Blues", vmin=0, vmax=float(max(means.max(), 1e-9)))
    for (row, column), value in np.ndenumerate(means):
        colour = "white" if value > 0.6 * means.max() else INK
        shown = f"{round(value, 2) + 0.0:.2f}"  # no -0.00
        left.text(column, row, shown, ha="center", va="center", fontsize=8, color=colour)
    left.set(xlabel="order asked for", ylabel="order in the world")
    left.set_xticks(range(len(tested)), [str(j) for j in tested])
    left.set_yticks(range(len(arms)), [arm.removeprefix("order_") for arm in arms])
    for arm, colour in zip(arms, COLOURS, strict=False):
        reach = [int(key.removeprefix("auc_up_to_")) for key in found[arm][0] if key.startswith("auc_up_to_")]
        means_up = [np.mean([f[f"auc_up_to_{j}"] for f in found[arm]]) for j in reach]
        right.plot(reach, means_up, color=colour, marker="o", markersize=3.5, linewidth=1.4, label=_spoken(arm))
    right.set(xlabel="orders whose gates are left open, up to", ylabel="test AUC")
    tidy(left, right)
    left.grid(False)
    right.xaxis.get_major_locator().set_params(integer=True)
    right.legend(loc="lower right", frameon=False, fontsize=8, labelcolor=INK)
    return figure


def experts_plot(found: Found) -> Figure:
    """Draw how well the leading expert tells the population, by gate."""
    figure = _figure(7.2, 2.8)
    axes = figure.subplots()
    _dots(axes, [[f["nmi"] for f in trainings] for trainings in found.values()], COLOURS[0], "")
    _named(axes, list(found))
    axes.set(ylabel="normalised mutual information", ylim=(-0.04, 1.04))
    axes.axhline(0.8, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    tidy(axes)
    return figure


def shortcuts_plot(found: Found) -> Figure:
    """Draw the AUC on the rows where the easy feature misleads, by gate, and what is possible there."""
    figure = _figure(7.2, 2.8)
    axes = figure.subplots()
    _dots(axes, [[f["auc_disagrees"] for f in trainings] for trainings in found.values()], COLOURS[0], "")
    best = np.mean([f["best_disagrees"] for trainings in found.values() for f in trainings])
    axes.axhline(float(best), color=COLOURS[2], linewidth=1.0, linestyle=(0, (4, 3)), label="best possible")
    axes.axhline(0.5, color=INK, linewidth=0.8, linestyle=(0, (1, 3)), label="chance")
    _named(axes, list(found))
    axes.set(ylabel="AUC where the easy\nfeature misleads")
    tidy(axes, legend=True)
    return figure


PLOTS: dict[str, Callable[[Found], Figure]] = {
    "optfs": values_plot,
    "orders": orders_plot,
    "experts": experts_plot,
    "shortcuts": shortcuts_plot,
}


def _dots(axes: Axes, series: Sequence[Sequence[float]], colour: str, label: str, shift: float = 0.0) -> None:
    """Draw each world as a dot, and mean and interval beside it."""
    for place, values in enumerate(series):
        axes.plot([place + shift] * len(values), values, "o", color=colour, markersize=3.5, alpha=0.5)
        over = interval(values)
        whiskers = None if len(values) == 1 else [[over.mean - over.low], [over.high - over.mean]]
        axes.errorbar(
            [place + shift + 0.07],
            [over.mean],
            yerr=whiskers,
            color=colour,
            marker="_",
            markersize=8,
            linewidth=1.2,
            label=label if label and place == 0 else None,
        )


def _named(axes: Axes, arms: Sequence[str]) -> None:
    axes.set_xticks(range(len(arms)), [_spoken(arm).replace(" ", "\n") for arm in arms])


def _spoken(arm: str) -> str:
    return arm.replace("_", " ")


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor="white")
