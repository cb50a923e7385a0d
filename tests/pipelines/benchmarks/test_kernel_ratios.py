from __future__ import annotations

from functools import partial

import torch

from ctr_models import example_batch
from kernels.target_attention import padded
from kernels.target_attention import target_attention as jagged
from pipelines.benchmarks.kernel_ratios import (
    RATIOS,
    Setting,
    TargetAttentionInput,
    constant_context,
    constant_context_ways,
    target_attention,
)
from pipelines.benchmarks.report import BenchReport

SETTING = Setting("cpu", rounds=1, compiled=False, rows=40)
COLUMNS = ["operator", "sizes", "pass", "way", "ms", "vs eager", "vs compile", "of the roofline"]


def test_both_ways_of_target_attention_compute_the_same() -> None:
    given = TargetAttentionInput(40, 4, "cpu")
    assert given.offsets.shape == (41,) and given.values.shape == (int(given.offsets[-1]), 4)
    found, expected = given.step(jagged), given.step(partial(padded, longest=given.longest))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_target_attention_needs_less_memory_than_its_padded_way() -> None:
    report = BenchReport("ratios", COLUMNS)
    target_attention(report, SETTING, width=8)
    assert set(report.figures) == {f for f in RATIOS["target_attention"].figures if "compile" not in f}
    assert report.figures["ratio_target_attention"] > 0
    assert 0 < report.figures["memory_target_attention"] < 0.5
    assert len(report.rows) == 1


def test_gates_row_by_row_give_the_same_step() -> None:
    engines = constant_context_ways(SETTING)
    batch = example_batch(engines["ours"].model.schema, rows=40)
    losses = []
    for engine in engines.values():
        for _ in range(3):
            torch.manual_seed(1)
            loss = engine.step(batch)
        losses.append(loss)
    torch.testing.assert_close(*losses)


def test_a_constant_context_is_measured() -> None:
    report = BenchReport("ratios", COLUMNS)
    constant_context(report, SETTING)
    assert set(report.figures) == set(RATIOS["constant_context"].figures)
    assert report.figures["ratio_constant_context"] > 0
    assert report.rows[0][:3] == ("constant_context", "rows 40", "training step")
