from __future__ import annotations

import subprocess
import sys
from xml.etree import ElementTree

import numpy as np

from pipelines.evaluation import plots
from pipelines.evaluation.calibration import reliability

HISTORY = [
    {"train_loss": 0.5, "valid_auc": 0.70, "valid_logloss": 0.48, "gate/a/mean": 1.0, "gate/a/std": 0.1},
    {"train_loss": 0.4, "valid_auc": 0.72, "valid_logloss": 0.47, "gate/a/mean": 1.1, "gate/a/std": 0.2},
]


def test_reliability_plot_draws_the_curve():
    rng = np.random.default_rng(0)
    p = rng.random(1000)
    y = rng.random(1000) < p
    axes = plots.reliability_plot(y, p).axes[0]
    drawn = axes.lines[0].get_xydata()
    curve = reliability(y, p)
    assert np.allclose(drawn, np.column_stack([curve.predicted, curve.observed]))


def test_learning_curve_draws_each_epoch():
    left, right = plots.learning_curve(HISTORY).axes
    assert left.lines[0].get_xydata().tolist() == [[1, 0.5], [2, 0.4]]
    assert right.lines[0].get_xydata().tolist() == [[1, 0.70], [2, 0.72]]


def test_telemetry_plot_draws_each_gate_and_bears_missing_figures():
    mean, saturation, entropy = plots.telemetry_plot(HISTORY).axes
    assert mean.lines[0].get_xydata().tolist() == [[1, 1.0], [2, 1.1]]
    assert np.isnan(saturation.lines[0].get_ydata()).all()
    assert entropy.get_ylabel() == "entropy (bits)"
    assert not plots.telemetry_plot([{"train_loss": 0.1}]).axes[0].lines


def test_telemetry_plot_leaves_out_what_is_no_mask():
    told = {"gate/exits.0/share": 0.7, "gate/exits.gates.0/mean": 0.4}
    assert [line.get_label() for line in plots.telemetry_plot([told]).axes[0].lines] == ["exits.gates.0"]


def test_svg_is_well_formed_repeatable_and_asks_for_nothing():
    text = plots.svg(plots.learning_curve(HISTORY))
    ElementTree.fromstring(text)
    assert text == plots.svg(plots.learning_curve(HISTORY))
    assert text.startswith("<svg")
    assert "purl.org" not in text
    assert "epoch</text>" in text  # text stays text


def test_matplotlib_is_not_imported_before_it_is_needed():
    code = "import sys, pipelines.evaluation.plots; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
