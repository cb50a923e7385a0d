"""The exported program gives a bundle's scores; the benchmark holds it against the ways that a server has."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import typer

from ctr_models.errors import ConfigError
from pipelines.release.bundle import Bundle
from pipelines.release.example import example_bundle
from serving.benchmarks import forward_bench
from serving.benchmarks.synthetic import requests
from serving.forward import Way
from serving.scorer import Scorer, card_of


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return example_bundle(tmp_path_factory.mktemp("made") / "bundle", model={"name": "dnn", "mlp": {"hidden": [8]}})


@pytest.fixture(scope="module")
def program(bundle: Bundle) -> Way:
    return forward_bench.exported(bundle)


def test_the_exported_program_gives_the_scores(bundle: Bundle, program: Way) -> None:
    scorer = Scorer(bundle, card_of(bundle))
    whole = {"item_id": "item-1", "price": 2.5, "tags": ["new"]}
    for rows in (1, 7):
        asked = requests(bundle, rows)[:3]
        for one in asked:  # all give the same columns, as those of a pass do
            one["candidates"] = [{**whole, **candidate} for candidate in one["candidates"]]
        with torch.inference_mode():
            found = program([scorer.encode(**one) for one in asked]).numpy()
        np.testing.assert_allclose(found, np.concatenate([bundle.score_request(**one) for one in asked]), atol=1e-5)


def test_a_run(bundle: Bundle, program: Way, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward_bench, "exported", lambda _: program)
    out = tmp_path / "figures.json"
    with pytest.raises(typer.Exit):
        forward_bench.main([bundle.directory], 0.02, json=out, at_least=["exported_over_best=1e9"])
    told = json.loads(out.read_text())
    assert [row[:2] for row in told["rows"]] == [["dnn", "eager"], ["", "exported"]]
    wanted = {f"1_dnn_{way}_{rows}_ms" for way in ("eager", "exported") for rows in (1, 100, 500)}
    wanted |= {"1_dnn_load_seconds", "1_dnn_export_seconds", "exported_over_best"}
    assert wanted <= set(forward_bench.figures(["1_dnn"], (1, 100, 500)))
    assert set(told["figures"]) == wanted and all(figure > 0 for figure in told["figures"].values())


def test_a_bar_for_no_figure_is_refused_before_anything_is_measured(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forward_bench, "exported", lambda _: pytest.fail("it was measured"))
    with pytest.raises(ConfigError, match="no figure '1_dnn_eagr_1_ms'. did you mean '1_dnn_eager_1_ms'"):
        forward_bench.main([bundle.directory], at_most=["1_dnn_eagr_1_ms=1"])
