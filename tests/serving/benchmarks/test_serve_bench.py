"""One small run over a real server, with a stand-in for MLflow's; and what is refused before."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import typer

from ctr_models.errors import ConfigError
from pipelines.release.bundle import Bundle
from pipelines.release.example import example_bundle
from serving.benchmarks import cores, mlflow_server, serve_bench
from serving.benchmarks.serve_bench import figures, main


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "bundle"
    return example_bundle(folder, model={"name": "dnn", "mlp": {"hidden": [8]}}).directory


def test_a_run(bundle: Path, port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def stand_in(*_: object) -> Iterator[int]:
        yield port

    monkeypatch.setattr(mlflow_server, "mlflow_server", stand_in)
    monkeypatch.setattr(serve_bench, "TAIL_ROUNDS", 1)
    out = tmp_path / "figures.json"
    with pytest.raises(typer.Exit):
        main([bundle], 0.1, [2, 1], events=True, json=out, at_least=["ratio_forward=1e9"])
    told = json.loads(out.read_text())
    found = told["figures"]
    assert set(found) == set(figures([Bundle.load(bundle)], [1, 2], mlflow=True))
    assert [row[1:4] for row in told["rows"]] == [
        *(["sluice", "1", "1"], ["sluice", "2", "1"], ["mlflow", "1", "1"]),
        *(["sluice", "1", "100"], ["sluice", "2", "100"], ["mlflow", "1", "100"]),
        *(["sluice", "1", "500"], ["sluice", "2", "500"], ["mlflow", "1", "500"], ["forward pass", "", "500"]),
        *(["sluice, unloaded", "1", "100"], ["sluice, capacity", *told["rows"][11][2:4]]),
        ["sluice, half", "open", "100"],
    ]
    assert all(row[-1] == "0" for row in told["rows"])
    rates = {
        cell: found[f"1_dnn_{cell}_rows_per_second"] for cell in ("sluice_1_500", "sluice_2_500", "mlflow_1_500")
    }
    assert found["ratio_mlflow_500"] == pytest.approx(rates["sluice_1_500"] / rates["mlflow_1_500"])
    alone = found["1_dnn_forward_rows_per_second"]
    assert found["ratio_forward"] == pytest.approx(max(rates["sluice_1_500"], rates["sluice_2_500"]) / alone)
    assert found["ratio_forward_small"] == found["ratio_forward"]
    tail = found["1_dnn_sluice_half_100_p99_ms"] / found["1_dnn_sluice_unloaded_100_p50_ms"]
    assert found["1_dnn_p99_half_over_p50"] == pytest.approx(tail)  # with one round
    assert found["1_dnn_p99_half_over_p50_median"] == pytest.approx(tail)


def test_a_bar_for_no_figure_is_refused_before_anything_is_measured(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cores, "pauses", lambda _: pytest.fail("it was measured"))
    with pytest.raises(ConfigError, match=r"no figure 'ratio_mlfow'\. did you mean 'ratio_mlflow'"):
        main([bundle], at_least=["ratio_mlfow=10"])
    with pytest.raises(ConfigError, match="no figure 'ratio_mlflow'"):
        main([bundle], mlflow=False, at_least=["ratio_mlflow=10"])
