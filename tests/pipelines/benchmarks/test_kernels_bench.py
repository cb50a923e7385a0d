from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from ctr_models.errors import ConfigError
from kernels import OPERATORS
from pipelines.benchmarks import kernels_bench as bench
from pipelines.benchmarks.kernel_ratios import RATIOS, Ratio, Setting
from pipelines.benchmarks.kernels_bench import Machine, has_room, overhead, sizes_up_to
from pipelines.cli import build_app


def test_the_roofline_is_the_longer_of_the_two_times() -> None:
    machine = Machine(bandwidth=10.0, rate=100.0)
    assert machine.roofline(moved=20, computed=100) == 2.0
    assert machine.roofline(moved=20, computed=900) == 9.0


def test_sizes_of_too_many_rows_are_left_out() -> None:
    for operator in OPERATORS.values():
        assert operator.workload is not None
        few = sizes_up_to(operator, 4096)
        assert few
        assert all(sizes.get("rows", 0) <= 4096 for sizes in few)
        assert sizes_up_to(operator, None) == list(operator.workload.grid)


def test_a_way_without_room_is_told_from_one_that_fails() -> None:
    def full() -> None:
        raise torch.OutOfMemoryError

    def wrong() -> None:
        raise ValueError("wrong")

    assert has_room(lambda: None) and not has_room(full)
    with pytest.raises(ValueError, match="wrong"):
        has_room(wrong)


def test_the_overhead_is_a_few_microseconds() -> None:
    assert 0 < overhead() < 1e-3


@pytest.mark.parametrize(
    ("option", "wrong", "right"),
    [("operators", "gated_crosss", "gated_cross"), ("ratios", "constant_contex", "constant_context")],
)
def test_a_wrong_name_tells_the_nearest(option: str, wrong: str, right: str) -> None:
    result = CliRunner().invoke(build_app(), ["bench", "kernels", f"--{option}", wrong])
    assert result.exit_code != 0
    assert right in f"{result.output}{result.exception}"


def test_ratios_alone(monkeypatch, tmp_path) -> None:
    told = []

    def ratio(report, setting) -> None:
        told.append(setting)
        report.figures["ratio_own"] = 2.0

    monkeypatch.setitem(RATIOS, "own", Ratio(ratio, ["ratio_own", "ratio_compile_own"]))
    path = tmp_path / "figures.json"
    arguments = ["--operators", "none", "--ratios", "own", "--rounds", "3", "--no-compile", "--json", str(path)]
    result = CliRunner().invoke(build_app(), ["bench", "kernels", "--device", "cpu", *arguments])
    assert result.exit_code == 0, result.output
    assert told == [Setting("cpu", rounds=3, compiled=False)]
    assert set(json.loads(path.read_text())["figures"]) == {"ratio_own", "overhead_us"}


@pytest.mark.parametrize(("bar", "code"), [("overhead_us=1000", 0), ("overhead_us=0", 1)])
def test_figures_and_bars(monkeypatch, tmp_path, bar: str, code: int) -> None:
    from kernels.dispatch import Workload

    workload = OPERATORS["gated_cross"].workload
    assert workload is not None
    small = Workload(workload.make, ({"rows": 3, "width": 4},), workload.moved, workload.computed)
    monkeypatch.setattr(OPERATORS["gated_cross"], "workload", small)
    monkeypatch.setattr("pipelines.benchmarks.kernels_bench.measured", lambda *_: Machine(1e9, 1e9))
    arguments = [
        "bench",
        "kernels",
        "--operators",
        "gated_cross",
        "--ratios",
        "none",
        "--no-compile",
        "--rounds",
        "1",
    ]
    path = tmp_path / "figures.json"
    result = CliRunner().invoke(build_app(), [*arguments, "--device", "cpu", "--json", str(path), "--at-most", bar])
    assert result.exit_code == code, result.output
    figures = json.loads(path.read_text())["figures"]
    assert figures["ratio_eager_gated_cross_rows3_width4_step"] > 0
    grid = [(OPERATORS["gated_cross"], {"rows": 3, "width": 4})]
    assert set(figures) == set(bench.figures(grid, [], compiled=False))
    assert "ratio_compile_gated_cross_rows3_width4_step" in set(bench.figures(grid, [], compiled=True))


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("overhead_u", "overhead_us"), ("ratio_scores_deep", "ratio_scores_deepfm"), ("ratio_compile_scores", "")],
)
def test_a_bar_for_no_figure_is_refused_before_anything_is_measured(monkeypatch, wrong: str, right: str) -> None:
    monkeypatch.setattr(bench, "_operators", lambda *_: pytest.fail("it was measured"))
    with pytest.raises(ConfigError, match=f"no figure '{wrong}'.*{right}"):
        bench.main(operators="gated_cross", device="cpu", compiled=False, at_least=[f"{wrong}=1"])
