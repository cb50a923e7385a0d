from __future__ import annotations

import pytest
import torch

from ctr_models import create_model
from pipelines.benchmarks import score_ratios
from pipelines.benchmarks.kernel_ratios import Setting
from pipelines.benchmarks.report import BenchReport
from pipelines.benchmarks.score_ratios import MEASURED, frappe, request, scores, shop

COLUMNS = ["operator", "sizes", "pass", "way", "ms", "vs eager", "vs compile", "of the roofline"]


@pytest.mark.parametrize("schema", [shop(), frappe()], ids=["shop", "frappe"])
def test_both_ways_score_alike(schema) -> None:
    candidates = request(schema, candidates=3)
    model = create_model("dnn", schema, embedding_std=0.1).eval()
    torch.testing.assert_close(model.scores(candidates), model(candidates.joined(schema)), rtol=1e-5, atol=1e-5)


def test_histories_of_the_shop_are_of_full_length() -> None:
    candidates = request(shop(), candidates=3)
    assert candidates.shared.sequences.lengths().tolist() == [50, 50]
    assert len(candidates.names) == 40 + 2


def test_the_bar_is_the_least_of_its_models(monkeypatch) -> None:
    chosen = [one for one in MEASURED if one.figure in ("dnn", "finalmlp", "frappe_dnn")]
    monkeypatch.setattr(score_ratios, "MEASURED", chosen)
    monkeypatch.setattr(score_ratios, "CANDIDATES", 3)
    report = BenchReport("ratios", COLUMNS)
    scores(report, Setting("cpu", rounds=1, compiled=False))
    figures = report.figures
    assert figures["ratio_scores"] == min(figures["ratio_scores_dnn"], figures["ratio_scores_finalmlp"])
    assert figures["ratio_scores_frappe_dnn"] > 0
    assert set(figures) < set(score_ratios.FIGURES)
    assert len(report.rows) == 3
