from __future__ import annotations

import json
import re

import pytest
from typer.testing import CliRunner

from ctr_models.errors import ConfigError
from pipelines.cli import build_app

CONFIG = """
name: compare-test
workdir: {workdir}
data: {{source: click_world, options: {{rows: 6000, users: 200, items: 60, days: 6}}}}
model: {{name: gdcn, cross_layers: 1, mlp: {{hidden: [8]}}, gates: {{cross: sigmoid}}}}
train: {{epochs: 1, batch_size: 512, threads: 1}}
tracking: {{enabled: false}}
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    path = folder / "ctr.yaml"
    path.write_text(CONFIG.format(workdir=folder / "runs"))
    return path


def sluice(*arguments):
    return CliRunner().invoke(build_app(), ["compare", *map(str, arguments)], env={"COLUMNS": "160"})


def test_arms_are_trained_compared_and_reported(config):
    arms = ["--arm", "none", "--arm", "gated=model.gates.cross=sigmoid,model.mlp.dropout=0.1"]
    result = sluice("-c", config, *arms, "--seeds", 2, "--json", "-", "-q")
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert [a["name"] for a in content["arms"]] == ["none", "gated"]
    assert content["arms"][0]["gates"]["cross"] == "none"
    assert {d["metric"] for d in content["differences"]} == {"auc", "logloss"}
    for d in content["differences"]:
        assert d["low"] <= d["value"] <= d["high"]
        assert d["verdict"] in ("better", "worse", "noise")
        assert (d["seeds"], d["control"]) == (2, "none")
    mean = next(told["mean"] for told in content["arms"][1]["telemetry"].values() if told["std"] > 0)
    assert content["best_possible"]["auc"] > content["arms"][0]["test"]["auc"]["mean"]
    page = (config.parent / "runs" / "experiments" / "compare" / "report.html").read_text()
    assert "best possible" in page
    assert content["report"].endswith("report.html")

    again = sluice("-c", config, *arms, "--seeds", 2, "--json", config.parent / "again.json")
    assert again.exit_code == 0
    assert "already trained" in again.output
    assert re.search(rf"gated\W+\S*cross\S*\W+{mean:.4f}", again.output)
    assert not re.search(r"none\W+\S*cross", again.output)  # it does nothing
    assert re.search(r"gated\W+AUC\W+[+-]0\.\d{5}", again.output)
    assert json.loads((config.parent / "again.json").read_text())["differences"] == content["differences"]


def test_an_experiment_comes_from_a_file(config):
    path = config.parent / "experiment.yaml"
    path.write_text(
        "name: from-file\ncontrol: base\nprimary: logloss\n"
        "arms: [{name: base}, {name: open, model: {gates: {cross: none}}}]\n"
        "decision: {seeds: [3], resamples: 100}\n"
    )
    result = sluice("-c", config, "--experiment", path, "--json", "-", "-q")
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert content["experiment"]["name"] == "from-file"
    assert content["winner"] in ("base", "open")
    assert "one seed" in result.stderr and re.search(r"mean of 1 seed\b", result.stderr)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arm", "none"], "command line: --arm: a comparison needs two arms, got 1"),
        (["--arm", "none", "--arm", "none"], "command line: arms appear twice: none"),
        (
            ["--arm", "a", "--arm", "b=train.epochs=3"],
            "arm 'b': 'train.epochs=3' is not of the model or the recipe",
        ),
        (
            ["--arm", "a", "--arm", "b=model.gates.corss=none"],
            "arm 'b': model.gates.corss: model 'gdcn' has no gate slot",
        ),
        (["--arm", "a", "--arm", "b", "--control", "c"], "command line: control 'c' is no arm"),
        (["--arm", "none", "--arm", "with space"], "arm 'with space': name: must match"),
        (["--arm", "none", "--arm", "squeeze excite"], "no gate 'squeeze excite'. did you mean 'squeeze_excite'?"),
        (["--arm", "a", "--experiment", "x.yaml"], "--experiment names the arms itself"),
        (["--experiment", "missing.yaml"], "missing.yaml: no such file"),
    ],
)
def test_mistakes_are_the_users_to_mend(config, arguments, message):
    result = sluice("-c", config, *arguments)
    assert isinstance(result.exception, ConfigError)
    assert message in str(result.exception)


def test_help_shows_examples_without_importing_the_engine():
    import subprocess
    import sys

    code = "import sys, pipelines.commands.compare as c; sys.exit(bool({'torch', 'polars'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert "--arm none --arm sigmoid2" in sluice("--help").output
