from __future__ import annotations

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from pipelines.cli import build_app
from pipelines.commands.bench import benchmarks


def test_every_benchmark_of_the_house_is_found():
    found = benchmarks()
    assert found["train"] == "pipelines.benchmarks.train_bench"
    assert all(module.endswith("_bench") for module in found.values())


@pytest.mark.parametrize("name", sorted(benchmarks()))
def test_every_benchmark_says_what_it_does_and_takes_bars(name):
    shown = CliRunner().invoke(build_app(), ["bench", name, "--help"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0, shown.output
    assert "--at-least" in shown.output
    assert "--at-most" in shown.output
    assert "--json" in shown.output


def test_an_unknown_benchmark_is_refused():
    assert CliRunner().invoke(build_app(), ["bench", "no-such"]).exit_code == 2


def test_looking_for_benchmarks_imports_nothing_heavy():
    code = (
        "import sys; from pipelines.commands.bench import benchmarks; benchmarks(); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
