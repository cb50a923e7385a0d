"""Plots of a run, for MLflow and for reports. Each returns a matplotlib Figure and touches no global state."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from pipelines.evaluation.calibration import reliability

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT = "#24292f", "#d0d7de"
"""Text and grid; reports replace them by the reader's theme."""
COLOURS = ("#3b7dd8", "#d9730d", "#2a9d6f", "#b5479d", "#8a6d3b", "#5b5bd6", "#c0392b", "#008b8b")
"""Lines: apart in lightness as well as in hue, legible on white and on black."""

History = Sequence[Mapping[str, Any]]
"""One mapping an epoch: ``train_loss``, ``valid_auc``, ``valid_logloss``, and what each gate tells as
``gate/<path>/<figure>``, the figures being ``mean``, ``std``, ``saturation``, ``entropy``. Keys may be missing."""


def reliability_plot(label: npt.ArrayLike, p: npt.ArrayLike, *, bins: int = 20) -> Figure:
    """Draw predicted against observed click rate with 95 % intervals, and where the predictions lie.

    Args:
        label: 0 or 1, (N,).
        p: probabilities, (N,).
        bins: equal-mass bins at most.

    Raises:
        DataError: empty, a label other than 0 or 1, NaN, a probability outside [0, 1].

    Example:
        >>> reliability_plot([0, 1, 0, 1], [0.2, 0.9, 0.1, 0.6]).axes[0].get_xlabel()
        'predicted'
    """
    return reliability_plots({"": (label, p)}, bins=bins)


def reliability_plots(arms: Mapping[str, tuple[npt.ArrayLike, npt.ArrayLike]], *, bins: int = 20) -> Figure:
    """Draw :func:`reliability_plot` for several arms in one picture: name to (label, p)."""
    figure = _figure(4.6, 4.6)
    above, below = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": (4, 1)})
    top = 0.0
    for colour, (name, (label, p)) in zip(_colours(), arms.items(), strict=False):
        curve = reliability(label, p, bins=bins)
        above.errorbar(
            curve.predicted,
            curve.observed,
            yerr=(curve.observed - curve.low, curve.high - curve.observed),
            color=colour,
            marker="o",
            markersize=3.5,
            linewidth=1.4,
            elinewidth=0.8,
            label=name or None,
        )
        below.hist(p, bins=50, color=colour, histtype="stepfilled", alpha=0.5)
        top = max(top, float(curve.predicted.max()), float(curve.high.max()))
    limit = min(1.0, top * 1.05)
    above.plot([0, limit], [0, limit], color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    above.set(xlim=(0, limit), ylim=(0, limit), ylabel="observed", xlabel="predicted")
    above.xaxis.label.set_visible(False)
    below.set(xlabel="predicted", ylabel="rows", yticks=[])
    tidy(above, below, legend=len(arms) > 1)
    return figure


def learning_curve(history: History) -> Figure:
    """Draw loss and AUC by epoch.

    Args:
        history: one mapping an epoch, see :data:`History`.

    Example:
        >>> len(learning_curve([{"train_loss": 0.5, "valid_auc": 0.7}]).axes)
        2
    """
    return learning_curves({"": history})


def learning_curves(arms: Mapping[str, History]) -> Figure:
    """Draw :func:`learning_curve` for several arms in one picture: name to history."""
    figure = _figure(7.6, 3.2)
    left, right = figure.subplots(1, 2)
    for colour, (name, history) in zip(_colours(), arms.items(), strict=False):
        prefix = f"{name}, " if name else ""
        _line(left, history, "train_loss", label=f"{prefix}training", color=colour, linestyle=(0, (4, 2)))
        _line(left, history, "valid_logloss", label=f"{prefix}validation", color=colour)
        _line(right, history, "valid_auc", label=f"{prefix}validation", color=colour)
    left.set(xlabel="epoch", ylabel="logloss")
    right.set(xlabel="epoch", ylabel="AUC")
    tidy(left, right, legend=True)
    for axes in (left, right):
        axes.xaxis.get_major_locator().set_params(integer=True)
    return figure


def telemetry_plot(history: History) -> Figure:
    """Draw each gate's mean with a band of one standard deviation, and its saturation and entropy, by epoch.

    Args:
        history: one mapping an epoch, see :data:`History`.

    Returns:
        A figure without lines when no gate was telling.

    Example:
        >>> told = {"gate/cross/mean": 0.5, "gate/cross/std": 0.1, "gate/cross/entropy": 0.9}
        >>> telemetry_plot([told]).axes[0].get_ylabel()
        'mean'
    """
    figure = _figure(7.6, 3.0)
    panels = figure.subplots(1, 3)
    told = [(epoch, gates) for epoch, record in enumerate(history, start=1) if (gates := gates_of(record))]
    paths = dict.fromkeys(path for _, gates in told for path, figures in gates.items() if "mean" in figures)
    for colour, path in zip(_colours(), paths, strict=False):
        mine = [(epoch, gates[path]) for epoch, gates in told if path in gates]
        epochs = [epoch for epoch, _ in mine]
        for axes, key in zip(panels, ("mean", "saturation", "entropy"), strict=True):
            values = [gate.get(key, float("nan")) for _, gate in mine]
            axes.plot(epochs, values, color=colour, marker="o", markersize=3, linewidth=1.4, label=path)
            if key == "mean":
                low = [v - gate.get("std", 0.0) for v, (_, gate) in zip(values, mine, strict=True)]
                high = [v + gate.get("std", 0.0) for v, (_, gate) in zip(values, mine, strict=True)]
                axes.fill_between(epochs, low, high, color=colour, alpha=0.15, linewidth=0)
    for axes, name in zip(panels, ("mean", "saturation", "entropy (bits)"), strict=True):
        axes.set(xlabel="epoch", ylabel=name)
        axes.xaxis.get_major_locator().set_params(integer=True)
    panels[1].set_ylim(-0.03, 1.03)
    panels[2].set_ylim(-0.03, 1.03)
    tidy(*panels)
    if paths:
        figure.legend(
            *panels[0].get_legend_handles_labels(),
            loc="outside upper center",
            ncols=3,
            frameon=False,
            fontsize=8,
            labelcolor=INK,
        )
    return figure


def gates_of(record: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return the figures of each gate by its path, from one record of a history.

    Example:
        >>> gates_of({"train_loss": 0.5, "gate/cross/mean": 0.4, "gate/cross/std": 0.1})
        {'cross': {'mean': 0.4, 'std': 0.1}}
    """
    gates: dict[str, dict[str, float]] = {}
    for key, value in record.items():
        if key.startswith("gate/"):
            path, _, figure = key.removeprefix("gate/").rpartition("/")
            gates.setdefault(path, {})[figure] = value
    return gates


def svg(figure: Figure) -> str:
    """Return the figure as an SVG element, text kept as text, without the XML prologue."""
    import matplotlib as mpl

    buffer = io.StringIO()
    # A fixed salt makes the same plot the same bytes.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "sluice"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = re.sub(r"<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.DOTALL)
    return text[text.index("<svg") :]


def _colours() -> list[str]:
    return list(COLOURS) * 8


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def _line(axes: Axes, history: History, key: str, **style: Any) -> None:
    points = [(epoch, record[key]) for epoch, record in enumerate(history, start=1) if key in record]
    if points:
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1.4, **style)


def tidy(*panels: Axes, legend: bool = False) -> None:
    for axes in panels:
        axes.set_facecolor("none")
        axes.grid(True, color=FAINT, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(colors=INK, labelsize=8, length=0)
        axes.xaxis.label.set_color(INK)
        axes.yaxis.label.set_color(INK)
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(FAINT)
        if legend and axes.get_legend_handles_labels()[1]:
            axes.legend(frameon=False, fontsize=8, labelcolor=INK)
