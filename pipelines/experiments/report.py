"""One HTML file that tells of a run: metrics beside the best possible, differences, curves, calibration, gates.

The file asks for nothing from elsewhere: styles and plots are inside it, and it follows the reader's light or dark
theme.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from pipelines.evaluation import plots
from pipelines.experiments.statistics import METRICS, Difference
from pipelines.features.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMES = {"auc": "AUC", "logloss": "Logloss", "gauc": "GAUC", "ne": "NE", "ece": "ECE"}
"""Metrics as columns, in this order."""
VERDICTS = {"better": "#2a9d6f", "worse": "#c0392b", "noise": "#7d8590"}
"""Colours of intervals."""
EXPLAINED = {
    "auc": "Area under the ROC curve: how often a click scores above a non-click",
    "logloss": "Mean cross-entropy in nats; lower is better",
    "gauc": "AUC inside each user, weighted by impressions",
    "ne": "Normalised entropy: logloss over that of the mean click rate; lower is better",
    "ece": "Expected calibration error: distance of prediction from click rate; lower is better",
}


@dataclass(frozen=True)
class ReportArm:
    """What a report shows of one trained model.

    Args:
        name: as the reader shall know it.
        metrics: of the test rows, as ``auc`` or ``test_auc``; likewise ``logloss``, ``gauc``, ``ne``, ``ece``.
        history: the training's evaluations, see :data:`pipelines.evaluation.plots.History`.
        predictions: (label, probability) of the test rows, for the reliability diagram.
        gates: the gate in each slot, by slot.
        rows_per_second: training speed.
    """

    name: str
    metrics: Mapping[str, float]
    history: plots.History = ()
    predictions: tuple[npt.ArrayLike, npt.ArrayLike] | None = None
    gates: Mapping[str, str] = field(default_factory=dict)
    rows_per_second: float | None = None

    def metric(self, name: str) -> float | None:
        """Return a test metric by its bare name."""
        return self.metrics.get(f"test_{name}", self.metrics.get(name))


def write_report(path: Path, title: str, arms: Sequence[ReportArm], **sections: Any) -> Path:
    """Render a report and write it whole.

    Args:
        path: the HTML file.
        title, arms, sections: as :func:`render_report`.

    Returns:
        ``path``, absolute.
    """
    path = Path(path).absolute()
    atomic_write(path, render_report(title, arms, **sections))
    return path


def render_report(
    title: str,
    arms: Sequence[ReportArm],
    *,
    differences: Sequence[Difference] = (),
    truth_metrics: Mapping[str, float] | None = None,
    notes: Sequence[str] = (),
    summary: Mapping[str, object] | None = None,
    serving_sample: tuple[object, object] | None = None,
) -> str:
    """Return the report as one HTML page.

    Args:
        title: heading of the page.
        arms: the models, in the order shown; at least one.
        differences: of arms from a control, from :func:`pipelines.experiments.statistics.compare`.
        truth_metrics: metrics of the true click probability: the best possible.
        notes: sentences for the reader, one paragraph each.
        summary: what was run: name to value.
        serving_sample: a request and its reply, shown as JSON.

    Example:
        >>> arms = [ReportArm("finalmlp, gate none", {"auc": 0.71, "logloss": 0.41}, rows_per_second=21000),
        ...         ReportArm("finalmlp, gate sigmoid2", {"auc": 0.72, "logloss": 0.40},
        ...                   history=[{"train_loss": 0.5, "valid_auc": 0.7}],
        ...                   predictions=([0, 1, 0, 1], [0.2, 0.8, 0.1, 0.6]), gates={"feature": "sigmoid2"})]
        >>> page = render_report("Demo", arms, truth_metrics={"auc": 0.74, "logloss": 0.39})
        >>> page.startswith("<!doctype html>"), "best possible" in page
        (True, True)
    """
    shown = [m for m in NAMES if any(arm.metric(m) is not None for arm in arms)]
    best = {}
    for metric in shown:
        known = [v for arm in arms if (v := arm.metric(metric)) is not None]
        best[metric] = max(known) if METRICS.get(metric, False) else min(known)
    told = [arm for arm in arms if any(plots.gates_of(record) for record in arm.history)]
    return fill(
        "report.html",
        title=title,
        summary=summary or {},
        notes=notes,
        arms=arms,
        metrics=shown,
        names=NAMES,
        explained=EXPLAINED,
        best=best,
        truth=truth_metrics or {},
        speeds=any(arm.rows_per_second for arm in arms),
        gated=any(arm.gates for arm in arms),
        differences=differences,
        percent=lambda share: f"{100 * share:.4g} %",
        forest=picture(forest_plot(differences), "forest") if differences else None,
        curves=picture(plots.learning_curves({a.name: a.history for a in arms if a.history}), "curves")
        if any(a.history for a in arms)
        else None,
        reliability=[
            (a.name, picture(plots.reliability_plot(*a.predictions), f"reliability{i}"))
            for i, a in enumerate(arms)
            if a.predictions is not None
        ],
        telemetry=[(a.name, picture(plots.telemetry_plot(a.history), f"gates{i}")) for i, a in enumerate(told)],
        sample=[json.dumps(part, indent=2, ensure_ascii=False, default=str) for part in serving_sample or ()],
    )


def fill(template: str, **content: Any) -> str:
    """Return a page made of one of ``templates/``, with the time of its making.

    Args:
        template: its file's name.
        content: what it asks for.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pipelines.experiments"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    environment.filters["number"] = number
    created = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return environment.get_template(template).render(created=created, **content)


def forest_plot(differences: Sequence[Difference]) -> Figure:
    """Draw each difference with its interval against zero, one panel a metric.

    Example:
        >>> d = Difference("b", "a", "auc", 0.002, 0.001, 0.003, 0.01, 0.95, "better", 3, 500, 9000)
        >>> [axes.get_title() for axes in forest_plot([d]).axes]
        ['AUC']
    """
    from matplotlib.figure import Figure

    metrics = list(dict.fromkeys(d.metric for d in differences))
    names = list(dict.fromkeys(d.challenger for d in differences))
    figure = Figure(figsize=(7.6, 0.9 + 0.38 * len(names)), layout="constrained")
    for axes, metric in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True):
        for d in (d for d in differences if d.metric == metric):
            height = len(names) - names.index(d.challenger)
            axes.plot([d.low, d.high], [height] * 2, color=VERDICTS[d.verdict], linewidth=2.2)
            axes.plot(d.value, height, "o", color=VERDICTS[d.verdict], markersize=5.5)
        axes.axvline(0, color=plots.INK, linewidth=0.8, linestyle=(0, (4, 3)))
        axes.set(ylim=(0.4, len(names) + 0.6), yticks=range(len(names), 0, -1))
        axes.set_yticklabels(names if metric == metrics[0] else [])
        axes.set_title(NAMES.get(metric, metric), fontsize=9, color=plots.INK)
        axes.ticklabel_format(axis="x", style="sci", scilimits=(-3, 3), useMathText=False)
        axes.xaxis.get_offset_text().set(color=plots.INK, fontsize=8)
        axes.locator_params(axis="x", nbins=5)
        plots.tidy(axes)
    return figure


def picture(figure: Figure, prefix: str) -> Any:
    """Return an SVG that may stand beside others in a page: ids made unique, ink and grid left to the page."""
    from markupsafe import Markup

    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", plots.svg(figure))
    text = text.replace(plots.INK, "var(--ink)").replace(plots.FAINT, "var(--line)")
    return Markup(text.replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1))


def number(value: object, digits: int = 5, signed: bool = False) -> str:
    """Return a number as the page shows it, a dash where there is none."""
    if not isinstance(value, int | float) or math.isnan(value):
        return "–"
    return f"{value:{'+' if signed else ''}.{digits}f}".replace("-", "\N{MINUS SIGN}")
