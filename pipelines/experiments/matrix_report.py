"""The gate matrix as a page with plots, and as Markdown with the same plots as files."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from ctr_models.errors import ConfigError
from pipelines.evaluation import plots
from pipelines.experiments.report import VERDICTS, fill, number, picture
from pipelines.features.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BEGIN, END = "<!-- results: written by sluice bench gates -->", "<!-- end of results -->"
OUTLYING = 2.0
"""A forest's edge lies this many times the third quartile from zero, so that one failure hides no other gate."""


def render_page(table: pl.DataFrame, *, notes: Sequence[str], about: Mapping[str, str]) -> str:
    """Return the page, one HTML file without anything from elsewhere.

    Args:
        table: summaries of all models, see :func:`pipelines.experiments.matrix.summary`.
        notes: sentences on how the figures came about.
        about: by model, what it was trained on.
    """
    models = []
    for name in table["model"].unique(maintain_order=True):
        own = table.filter(model=name)
        rows = own.with_columns(opens=pl.col("slot") != pl.col("slot").shift(1).fill_null("")).to_dicts()
        told = any(row["auc_value"] is not None for row in rows)
        models.append(
            {
                "name": name,
                "about": about[name],
                "rows": rows,
                "forest": picture(forest(own), f"forest-{name}") if told else None,
            }
        )
    compared = table["auc_value"].is_not_null().any()
    return fill(
        "matrix.html",
        title="Gate matrix",
        notes=notes,
        models=models,
        verdicts=[verdicts(table.filter(model=m["name"])) for m in models] if compared else [],
        gains=picture(gains(table), "gains") if compared else None,
    )


def verdicts(own: pl.DataFrame) -> dict[str, Any]:
    """Return what is to be said of a model's cells: which are better, which worse, and what valid would choose.

    Args:
        own: the model's summary.
    """
    rows = own.to_dicts()

    def named(verdict: str) -> list[str]:
        return [f"{r['slot']}: {r['gate']}" for r in rows if r["auc_verdict"] == verdict]

    chosen = next((r for r in rows if r["chosen"]), None)
    told = ""
    if chosen is not None:
        told = f"{chosen['slot']}: {chosen['gate']}"
        told += (
            " (control)" if chosen["gate"] == chosen["control"] else f" ({number(chosen['auc_value'], 5, True)})"
        )
    return {
        "name": rows[0]["model"],
        "cells": len(rows),
        "better": named("better"),
        "worse": named("worse"),
        "noise": len(named("noise")),
        "chosen": told,
    }


def forest(own: pl.DataFrame) -> Figure:
    """Draw each gate's difference to its control, AUC and logloss side by side, slot by slot, the best on top.

    Args:
        own: the summary of one model.
    """
    from matplotlib.figure import Figure

    rows = own.filter(pl.col("auc_value").is_not_null())
    slots = rows["slot"].unique(maintain_order=True)
    lines: list[dict[str, Any] | str] = []  # a slot's name, then its gates
    for slot in slots:
        control = rows.filter(slot=slot)["control"][0]
        lines += [
            f"{slot}, beside {control}",
            *rows.filter(slot=slot).sort("auc_value", descending=True).to_dicts(),
        ]
    figure = Figure(figsize=(9.2, 0.7 + 0.27 * len(lines)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True, gridspec_kw={"width_ratios": (5, 3)})
    for axes, metric, title in zip(panels, ("auc", "logloss"), ("AUC", "Logloss"), strict=True):
        edge = _edge(rows, metric)
        for place, line in enumerate(lines):
            if not isinstance(line, str):
                _interval(axes, line, metric, len(lines) - place, edge)
        axes.axvline(0, color=plots.INK, linewidth=0.8, linestyle=(0, (4, 3)))
        axes.set(ylim=(0.3, len(lines) + 0.7), xlim=(-1.04 * edge, 1.04 * edge))
        axes.set_title(f"{title}, {'more' if metric == 'auc' else 'less'} is better", fontsize=9, color=plots.INK)
        axes.ticklabel_format(axis="x", style="plain")
        axes.locator_params(axis="x", nbins=6 if metric == "auc" else 4)
        plots.tidy(axes)
        axes.grid(False, axis="y")
        for place, line in enumerate(lines):
            if isinstance(line, str):
                height = len(lines) - place
                axes.axhspan(height - 0.5, height + 0.5, color=plots.FAINT, alpha=0.35, linewidth=0)
    panels[0].set_yticks([len(lines) - i for i in range(len(lines))])
    labels = panels[0].set_yticklabels([line if isinstance(line, str) else line["gate"] for line in lines])
    for label, line in zip(labels, lines, strict=True):
        label.set(fontweight="bold" if isinstance(line, str) else "normal", fontsize=8.5)
    panels[1].tick_params(labelleft=False)
    return figure


def _edge(rows: pl.DataFrame, metric: str) -> float:
    """Return where the axis ends, on either side of zero."""
    reach = rows.select(pl.max_horizontal(pl.col(f"{metric}_low").abs(), pl.col(f"{metric}_high").abs()))
    reaches = reach.to_series()
    usual = reaches.quantile(0.75, "higher") or 0.0
    return max(min(float(reaches.max() or 0.0), OUTLYING * usual), 1e-6)  # type: ignore[arg-type]


def _interval(axes: Axes, row: Mapping[str, Any], metric: str, height: float, edge: float) -> None:
    value, low, high = (row[f"{metric}_{part}"] for part in ("value", "low", "high"))
    colour = VERDICTS[row[f"{metric}_verdict"]]
    if abs(value) > edge:
        side = math.copysign(1.0, value)
        axes.plot(side * edge, height, marker=">" if side > 0 else "<", color=colour, markersize=6)
        axes.annotate(
            number(value, 4, True),
            (side * edge, height),
            xytext=(-8 * side, 0),
            textcoords="offset points",
            ha="right" if side > 0 else "left",
            va="center",
            fontsize=8,
            color=colour,
        )
        return
    axes.plot([max(low, -edge), min(high, edge)], [height] * 2, color=colour, linewidth=2.2)
    axes.plot(value, height, "o", color=colour, markersize=5.5)
    if row["chosen"]:
        axes.plot(value, height, "o", markersize=10, markerfacecolor="none", markeredgecolor=plots.INK)


def gains(table: pl.DataFrame) -> Figure:
    """Draw difference in AUC against operations a row, a panel for each model and a colour for each slot.

    Args:
        table: summaries of all models.
    """
    from matplotlib.figure import Figure

    rows = table.filter(pl.col("auc_value").is_not_null())
    models = rows["model"].unique(maintain_order=True).to_list()
    colours = dict(zip(rows["slot"].unique(maintain_order=True), plots.COLOURS, strict=False))
    wide = min(3, len(models))
    high = -(-len(models) // wide)
    figure = Figure(figsize=(1.0 + 2.9 * wide, 0.6 + 2.6 * high), layout="constrained")
    panels = figure.subplots(high, wide, squeeze=False).flatten()
    for axes, model in zip(panels, models, strict=False):
        own = rows.filter(model=model)
        edge = _edge(own, "auc")
        for row in own.iter_rows(named=True):
            colour, sure = colours[row["slot"]], row["auc_verdict"] != "noise"
            height = max(-edge, min(edge, row["auc_value"]))
            marker = "o" if height == row["auc_value"] else ("^" if height > 0 else "v")
            face = colour if sure else "none"
            axes.plot(
                *(row["flops_per_row_ratio"], height, marker),
                markerfacecolor=face, markeredgecolor=colour, markersize=6.5,
            )  # fmt: skip
        for row in _told(own, edge):
            axes.annotate(
                row["gate"],
                (row["flops_per_row_ratio"], max(-edge, min(edge, row["auc_value"]))),
                xytext=(5, 4),
                textcoords="offset points",
                fontsize=7,
                color=plots.INK,
            )
        axes.axhline(0, color=plots.INK, linewidth=0.8, linestyle=(0, (4, 3)))
        axes.set_title(model, fontsize=9, color=plots.INK)
        axes.set(xlabel="operations, times the control's", ylim=(-1.15 * edge, 1.15 * edge))
        axes.margins(x=0.18)
        axes.locator_params(nbins=5)
        axes.xaxis.label.set_size(8.5)
        plots.tidy(axes)
    for axes in panels[len(models) :]:
        axes.set_visible(False)
    for axes in panels[::wide]:
        axes.set_ylabel("difference in AUC")
        axes.yaxis.label.set(color=plots.INK, size=8.5)
    handles = [panels[0].plot([], [], "o", color=colour, label=slot)[0] for slot, colour in colours.items()]
    figure.legend(
        handles=handles, loc="outside upper center", ncols=7, frameon=False, fontsize=8, labelcolor=plots.INK
    )
    return figure


def _told(own: pl.DataFrame, edge: float) -> list[dict[str, Any]]:
    """Return the cells to be named: those that differ, the best and the costliest, but none beside another."""
    rows = sorted(own.to_dicts(), key=lambda r: (r["auc_verdict"] == "noise", -abs(r["auc_value"])))
    costliest = max(rows, key=lambda r: r["flops_per_row_ratio"])
    best = max(rows, key=lambda r: r["auc_value"])
    span = max(r["flops_per_row_ratio"] for r in rows) - min(r["flops_per_row_ratio"] for r in rows) or 1.0
    named: list[dict[str, Any]] = []
    for row in [best, costliest, *(r for r in rows if r["auc_verdict"] != "noise")]:
        near = any(
            abs(row["auc_value"] - n["auc_value"]) < 0.12 * edge
            and abs(row["flops_per_row_ratio"] - n["flops_per_row_ratio"]) < 0.35 * span
            for n in named
        )
        if not near:
            named.append(row)
    return named


def write_markdown(
    path: Path, table: pl.DataFrame, *, notes: Sequence[str], about: Mapping[str, str]
) -> list[Path]:
    """Write the results between the marks of a Markdown file, and the plots as SVG into ``images/`` beside it.

    A file that is not there is begun; what stands outside the marks stays.

    Args:
        path: the file.
        table, notes, about: as :func:`render_page`.

    Returns:
        All files written.

    Raises:
        ConfigError: the file has no marks.
    """
    path = Path(path)
    before, after = "# Gate matrix\n\n", "\n"
    if path.exists():
        before, begin, rest = path.read_text(encoding="utf-8").partition(BEGIN)
        _, end, after = rest.partition(END)
        if not (begin and end):
            raise ConfigError(
                "no place for the results", where=str(path), remedy=f"write {BEGIN} and {END} into it"
            )
    images = path.parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    written, parts = [path], [BEGIN, *notes]
    compared = table.filter(pl.col("auc_value").is_not_null())
    for model in table["model"].unique(maintain_order=True):
        own = table.filter(model=model)
        parts += [f"### {model}", f"{about[model]}."]
        if model in compared["model"]:
            written.append(images / f"gate-matrix-{model}.svg")
            atomic_write(written[-1], standalone(forest(own)))
            parts.append(f"![differences of {model}'s gates to their controls](images/{written[-1].name})")
        parts.append(_markdown_table(own))
    if len(compared):
        written.append(images / "gate-matrix-gains.svg")
        atomic_write(written[-1], standalone(gains(table)))
        parts += ["### Gain against cost", f"![gain against cost](images/{written[-1].name})"]
    parts.append(END)
    atomic_write(path, before + "\n\n".join(parts) + after)
    return written


def _markdown_table(own: pl.DataFrame) -> str:
    head = ["slot", "gate", "test AUC", "sd", "difference", "interval", "p", "verdict", "parameters", "FLOPs ×"]
    head += ["rows/s ×", "ms ×", "gate's mean", "spread", "saturation", "entropy"]
    lines = [head, ["---", "---", *(["---:"] * 5), "---", *(["---:"] * 8)]]
    for row in own.to_dicts():
        verdict = "control" if row["gate"] == row["control"] else row["auc_verdict"] or "not finished"
        if row["error"] is not None:
            verdict = "failed: " + " ".join(row["error"].split()).replace("|", "\\|")
        elif verdict in ("better", "worse"):
            verdict = f"**{verdict}**"
        interval = ""
        if row["auc_value"] is not None:
            interval = f"{number(row['auc_low'], 5, True)} to {number(row['auc_high'], 5, True)}"
        lines.append(
            [
                row["slot"],
                f"`{row['gate']}`" + (" \\*" if row["chosen"] else ""),
                *(number(row[key]) for key in ("test_auc", "test_auc_sd")),
                *(number(row["auc_value"], 5, True), interval, number(row["auc_p"], 4), verdict),
                "–" if row["parameters"] is None else f"{row['parameters']:,}",
                *(number(row[f"{k}_ratio"], 2) for k in ("flops_per_row", "rows_per_second", "milliseconds")),
                *(number(row[f"gate_{name}"], 3) for name in ("mean", "std", "saturation", "entropy")),
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def standalone(figure: Figure) -> str:
    """Return an SVG file that follows the reader's light or dark theme by itself."""
    style = (
        f"<style>:root{{--ink:{plots.INK};--line:{plots.FAINT}}}"
        "@media (prefers-color-scheme: dark){:root{--ink:#e6edf3;--line:#30363d}}</style>"
    )
    text = plots.svg(figure).replace(plots.INK, "var(--ink)").replace(plots.FAINT, "var(--line)")
    return re.sub(r"(<svg [^>]*>)", rf"\g<1>{style}", text, count=1)
