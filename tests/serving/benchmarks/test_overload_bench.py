"""What the benchmark makes of answers; one small run over a real server."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import typer

from ctr_models.errors import ConfigError
from pipelines.release.example import example_bundle
from serving.benchmarks.open_loop import Answers
from serving.benchmarks.overload_bench import FIGURES, RUN, growth, main, recovery


def answers(status: list[int], milliseconds: list[float]) -> Answers:
    many = len(status)
    return Answers(10 + np.arange(many) / 2, np.zeros(many), np.array(milliseconds) / 1000, np.array(status))


def test_recovery_is_when_answers_are_as_they_were() -> None:
    assert recovery(answers([200] * RUN, [1.0] * RUN), 10, 0.002) == 0
    assert recovery(answers([200] * (RUN - 1), [1.0] * (RUN - 1)), 10, 0.002) == math.inf  # too few to tell
    assert recovery(answers([503] * 3 + [200] * RUN, [1.0] * (RUN + 3)), 10, 0.002) == 1.5
    slow = [9.0] * RUN + [1.0] * RUN
    assert recovery(answers([200] * 2 * RUN, slow), 10, 0.002) == 0.5 * (RUN // 2 + 1)
    assert recovery(answers([200] * 2 * RUN, [9.0] * 2 * RUN), 10, 0.002) == math.inf
    assert recovery(answers([200, 503] * RUN, [1.0] * 2 * RUN), 10, 0.002) == math.inf


def test_growth_is_what_an_overload_adds() -> None:
    mb = 2**20
    looks = [(0.0, 50 * mb), (0.9, 30 * mb), (1.2, 40 * mb), (2.5, 38 * mb), (3.5, 99 * mb)]
    assert growth(looks, 1.0, 3.0) == {"memory_growth_mb": 10.0, "memory_late_growth_mb": -2.0}
    for seen in (
        [looks[0], looks[2]],
        [looks[0], looks[3]],
        looks[:1],
    ):  # a machine that stands still looks at nothing
        assert math.isnan(growth(seen, 1.0, 3.0)["memory_late_growth_mb"])


def test_a_bar_for_no_figure_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no figure 'refused_p9_ms'. did you mean 'refused_p99_ms'"):
        main(tmp_path / "no-such-bundle", at_most=["refused_p9_ms=5"])


def test_a_run(tmp_path: Path) -> None:
    bundle = example_bundle(tmp_path / "bundle", model={"name": "dnn", "mlp": {"hidden": [8]}})
    out = tmp_path / "figures.json"
    with pytest.raises(typer.Exit):
        main(bundle.directory, 1.2, 2.0, out, ["offered_over_capacity=1e9"], None)
    told = json.loads(out.read_text())
    figures = told["figures"]
    assert figures["failed"] == 0
    assert figures["capacity_requests_per_second"] > 50
    assert 0 < figures["accepted_over_capacity"] < 2.1
    assert set(figures) == set(FIGURES)
    assert [row[0] for row in told["rows"]] == ["8 clients", "64 clients", "calm", "overload", "after"]
