from __future__ import annotations

import json

import pytest
import typer
from typer.testing import CliRunner

from ctr_models.errors import ConfigError
from pipelines.benchmarks.report import AtLeast, AtMost, BenchReport


@pytest.fixture
def report() -> BenchReport:
    report = BenchReport("speed", ["what", "rows/s"])
    report.row("ours", 12345.678)
    report.figures.update(rate=12345.678, share=0.03, broken=float("nan"))
    return report


def test_json_holds_the_figures_and_the_rows(report, tmp_path):
    report.finish(tmp_path / "deep" / "out.json")
    content = json.loads((tmp_path / "deep" / "out.json").read_text())
    assert content["figures"] == {"rate": 12345.678, "share": 0.03, "broken": None}
    assert content["rows"] == [["ours", "12,346"]]


def test_dash_prints_nothing_but_json(report, capsys):
    from pathlib import Path

    report.finish(Path("-"))
    assert json.loads(capsys.readouterr().out)["figures"]["share"] == 0.03


@pytest.mark.parametrize(
    ("at_least", "at_most", "missed"),
    [
        (["rate=12000"], ["share=0.05"], ""),
        (["rate=13000"], [], "rate is 12345.7, at least 13000"),
        ([], ["share=0.01"], "share is 0.03, at most 0.01"),
        (["broken=0"], [], "broken is nan"),
    ],
)
def test_a_missed_bar_exits_with_1_and_names_the_figure(report, capsys, at_least, at_most, missed):
    if missed:
        with pytest.raises(typer.Exit) as stop:
            report.finish(None, at_least, at_most)
        assert stop.value.exit_code == 1
        assert missed in capsys.readouterr().err
    else:
        report.finish(None, at_least, at_most)


@pytest.mark.parametrize("option", ["--at-least", "--at-most"])
def test_what_is_no_bar_is_refused_before_anything_is_measured(option):
    app = typer.Typer()
    measured = []

    @app.command()
    def bench(at_least: AtLeast = None, at_most: AtMost = None) -> None:
        measured.append((at_least, at_most))

    refused = CliRunner().invoke(app, [option, "rate=1", option, "rate>2"])
    assert str(refused.exception) == f"{option} 'rate>2': a bar is written key=number"
    assert measured == []
    assert CliRunner().invoke(app, [option, "rate=1"]).exit_code == 0
    assert measured


@pytest.mark.parametrize(
    ("bar", "says"), [("rte=1", "did you mean 'rate'"), ("rate", "key=number"), ("rate=x", "key=number")]
)
def test_a_bar_that_makes_no_sense_is_refused(report, bar, says):
    with pytest.raises(ConfigError, match=says):
        report.missed([bar])
