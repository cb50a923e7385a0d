from __future__ import annotations

import re
from html.parser import HTMLParser

import numpy as np
import pytest

from pipelines.experiments.report import ReportArm, forest_plot, render_report, write_report
from pipelines.experiments.statistics import Difference

VOID = {"meta", "link", "br", "img", "hr"}


class Page(HTMLParser):
    """Collects tags and ids, and fails on a tag that is closed out of turn."""

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.targets, self.outside = [], [], [], []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        if "id" in given:
            self.ids.append(given["id"])
        for key in ("href", "src", "xlink:href"):
            if key in given:
                (self.targets if given[key].startswith("#") else self.outside).append(given[key])

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page():
    rng = np.random.default_rng(0)
    p = rng.random(400)
    y = rng.random(400) < p
    history = [
        {
            "train_loss": 0.5 - 0.1 * i,
            "valid_auc": 0.7 + 0.01 * i,
            "gate/cross.0/mean": 0.5,
            "gate/cross.0/std": 0.1,
        }
        for i in range(3)
    ]
    first, second = {"test_auc": 0.7012, "test_logloss": 0.41, "test_ece": 0.01}, {"auc": 0.7034, "logloss": 0.40}
    arms = [
        ReportArm("open <none>", first, history, (y, p), {"cross": "none"}, 21_000.0),
        ReportArm("gated", {**second, "ece": 0.02}, history, (y, p), {"cross": "sigmoid"}, 18_500.0),
    ]
    differences = [
        Difference("gated", "open <none>", "auc", 0.0022, 0.001, 0.0034, 0.0004, 0.95, "better", 3, 943, 8000),
        Difference("gated", "open <none>", "logloss", -0.01, -0.02, 0.001, 0.06, 0.95, "noise", 3, 943, 8000),
    ]
    return render_report(
        "Click world & gates",
        arms,
        differences=differences,
        truth_metrics={"auc": 0.75, "logloss": 0.38},
        notes=["A note."],
        summary={"rows": "8,000"},
        serving_sample=({"user": {"name": "<b>"}}, {"scores": [0.5]}),
    )


def test_page_is_well_formed_and_its_links_lead_somewhere(page):
    parser = Page()
    parser.feed(page)
    assert parser.open == []
    assert len(parser.ids) == len(set(parser.ids))
    assert set(t.removeprefix("#") for t in parser.targets) <= set(parser.ids)


def test_page_asks_for_nothing_from_elsewhere(page):
    parser = Page()
    parser.feed(page)
    assert parser.outside == []
    assert "<script" not in page
    assert set(re.findall(r"https?://[^\"' ]+", page)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert "url(" not in page.replace("url(#", "")


def test_page_holds_every_section_and_figure(page):
    for heading in (
        "Run",
        "Metrics on the test rows",
        "Comparison",
        "Learning curves",
        "Calibration",
        "Gates",
        "Serving",
    ):
        assert f">{heading}</h2>" in page
    for text in (
        "0.70120",
        "0.70340",
        "best possible",
        "0.75000",
        "21,000",
        "cross: sigmoid",
        "+0.00220",
        "−0.01000",
        "noise",
    ):
        assert text in page
    assert page.count("<svg") == 6  # forest, curves, two reliability diagrams, two gates


def test_the_best_value_of_a_column_is_marked_by_the_metrics_direction(page):
    marked = re.findall(r'class="n top">([0-9.]+)<', page)
    assert marked == ["0.01000", "0.70340", "0.40000"]  # ece of the first arm, auc and logloss of the second


def test_names_are_escaped(page):
    assert "open &lt;none&gt;" in page
    assert "<none>" not in page
    assert "Click world &amp; gates" in page
    assert "&lt;b&gt;" in page


def test_plots_follow_the_theme(page):
    assert "prefers-color-scheme: dark" in page
    assert "var(--ink)" in page
    for drawn in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        assert "#24292f" not in drawn
        assert "#000000" not in drawn


def test_a_bare_report_has_only_its_metrics(tmp_path):
    path = write_report(
        tmp_path / "deep" / "report.html", "Bare", [ReportArm("a", {"auc": 0.7, "gauc": float("nan")})]
    )
    text = path.read_text()
    assert path.is_absolute()
    assert "<svg" not in text
    assert "best possible" not in text
    assert "Comparison" not in text
    assert "nan" not in text


def test_forest_plot_has_a_panel_a_metric_and_a_line_a_challenger():
    made = [
        Difference(name, "a", metric, 0.1, 0.0, 0.2, 0.5, 0.95, "noise", 1, 20, 200)
        for name in ("b", "c")
        for metric in ("auc", "logloss")
    ]
    panels = forest_plot(made).axes
    assert [p.get_title() for p in panels] == ["AUC", "Logloss"]
    assert [t.get_text() for t in panels[0].get_yticklabels()] == ["b", "c"]
