from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from pipelines.benchmarks.kernels_bench import Machine, overhead, timed
from pipelines.cli import build_app


def test_the_roofline_is_the_longer_of_the_two_times() -> None:
    machine = Machine(bandwidth=10.0, rate=100.0)
    assert machine.roofline(moved=20, computed=100) == 2.0
    assert machine.roofline(moved=20, computed=900) == 9.0


def test_calls_are_timed_in_turn_and_the_best_round_counts() -> None:
    calls: list[str] = []
    seconds = timed({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2, "cpu", least=0.0)
    assert calls == ["a"] * 3 + ["b"] * 3 + ["a", "b", "a", "b"]
    assert set(seconds) == {"a", "b"} and all(s >= 0 for s in seconds.values())


def test_the_overhead_is_a_few_microseconds() -> None:
    assert 0 < overhead() < 1e-3


def test_a_wrong_operator_names_the_nearest() -> None:
    result = CliRunner().invoke(build_app(), ["bench", "kernels", "--operators", "gated_crosss"])
    assert result.exit_code != 0
    assert "gated_cross" in f"{result.output}{result.exception}"


@pytest.mark.parametrize(("bar", "code"), [("overhead_us=1000", 0), ("overhead_us=0", 1)])
def test_figures_and_bars(monkeypatch, tmp_path, bar: str, code: int) -> None:
    from kernels import OPERATORS
    from kernels.dispatch import Workload

    workload = OPERATORS["gated_cross"].workload
    assert workload is not None
    small = Workload(workload.make, ({"rows": 3, "width": 4},), workload.moved, workload.computed)
    monkeypatch.setattr(OPERATORS["gated_cross"], "workload", small)
    monkeypatch.setattr("pipelines.benchmarks.kernels_bench.measured", lambda *_: Machine(1e9, 1e9))
    arguments = ["bench", "kernels", "--operators", "gated_cross", "--no-compile", "--rounds", "1"]
    path = tmp_path / "figures.json"
    result = CliRunner().invoke(build_app(), [*arguments, "--device", "cpu", "--json", str(path), "--at-most", bar])
    assert result.exit_code == code, result.output
    figures = json.loads(path.read_text())["figures"]
    assert figures["ratio_eager_gated_cross_rows3_width4_step"] > 0
