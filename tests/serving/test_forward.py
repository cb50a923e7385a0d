"""Whichever way computes a pass, the scores are the bundle's; the fastest one is taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from ctr_models.int8 import supported
from ctr_models.model import CTRModel, ModelSpec
from pipelines.features.spec import FeatureSpec
from pipelines.features.state import FeatureState
from pipelines.features.transform import encoded_rows, transform
from pipelines.release.bundle import Bundle
from pipelines.release.example import example_bundle
from pipelines.release.int8 import scores
from serving.forward import MEASURED_ROWS
from serving.scorer import Scorer, card_of

COLUMNS = {"user": "user", "hour": "context", "item": "item", "shop": "item"}
SIZES = (1, 3, 40, 300)


def plain_bundle(directory: Path, model: Any, *, seed: int = 0, std: float = 0.3) -> Bundle:
    """A bundle of categorical fields and a number, without lists."""
    make = np.random.default_rng(seed)
    log = pl.DataFrame(
        {"click": make.integers(0, 2, 300), "price": make.normal(size=300)}
        | {name: [f"{name}-{i}" for i in make.integers(0, 20, 300)] for name in COLUMNS}
    )
    columns = [{"name": name, "kind": "categorical", "role": role} for name, role in COLUMNS.items()]
    columns.append({"name": "price", "kind": "numeric", "role": "item"})
    spec = FeatureSpec.model_validate({"label": "click", "dim": 4, "columns": columns})
    state = FeatureState.fit(spec, log.lazy(), source="made")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        built = ModelSpec.parse(model).build(state.schema())
        for parameter in built.parameters():
            torch.nn.init.normal_(parameter, std=std)
    rows = encoded_rows(transform(state, log.lazy(), source="made").collect(), state.schema())
    told = scores(built.eval(), rows)
    rows.label[:] = told > np.median(told)  # 300 rows of chance would have an AUC that changes with the last bit
    return Bundle.create(directory, model=built, state=state, config={}, metrics={}, golden=log.head(8), seen=rows)


def requests(bundle: Bundle) -> list[dict[str, Any]]:
    make, made = np.random.default_rng(1), []
    for size in SIZES:
        items = [{"item": f"item-{i}", "shop": "shop-3", "price": float(i)} for i in make.integers(0, 25, size)]
        made.append({"user": {"user": f"user-{size}"}, "context": {"hour": "hour-7"}, "candidates": items})
    return made


@pytest.mark.parametrize("model", ["finalmlp", "gdcn", "deepfm", "autoint", "masknet"])
def test_both_ways_give_the_bundles_scores_for_any_number_of_rows_and_users(model: str, tmp_path: Path) -> None:
    bundle = plain_bundle(tmp_path / "bundle", model)
    scorer = Scorer(bundle, card_of(bundle))
    assert set(scorer.forward.ways) == {"eager", "traced"}
    given = requests(bundle)
    encoded = [scorer.encode(**one) for one in given]
    expected = [bundle.score_request(**one) for one in given]
    with torch.inference_mode():
        for way in scorer.forward.ways.values():
            for one, scores in zip(encoded, expected, strict=True):
                np.testing.assert_allclose(way([one]).numpy(), scores, atol=1e-5)
            np.testing.assert_allclose(way(encoded).numpy(), np.concatenate(expected), atol=1e-5)


@pytest.mark.skipif(not supported(), reason="torch has no int8 products on this machine")
@pytest.mark.parametrize("model", ["finalmlp", "gdcn"])
def test_layers_in_eight_bits_change_scores_by_a_thousandth_at_most(model: str, tmp_path: Path) -> None:
    bundle = plain_bundle(tmp_path / "bundle", model, std=0.05)
    assert "int8" not in Scorer(bundle, card_of(bundle)).forward.ways
    scorer = Scorer(bundle, card_of(bundle), int8=True)
    assert set(scorer.forward.ways) == {"eager", "traced", "int8"}
    given = requests(bundle)
    encoded = [scorer.encode(**one) for one in given]
    expected = np.concatenate([bundle.score_request(**one) for one in given])
    with torch.inference_mode():
        together = scorer.forward.ways["int8"](encoded).numpy()
        apart = np.concatenate([scorer.forward.ways["int8"]([one]).numpy() for one in encoded])
    np.testing.assert_allclose(together, expected, atol=1e-3)
    np.testing.assert_allclose(together, apart, atol=1e-6)
    assert (together != expected).any()


def test_a_program_in_eight_bits_that_is_too_far_off_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = plain_bundle(tmp_path / "bundle", "gdcn", std=0.05)
    assert bundle.int8 is not None
    wrong = {name: (low / 50, high / 50) for name, (low, high) in bundle.int8.ranges.items()}
    monkeypatch.setitem(bundle.__dict__, "int8", bundle.int8.model_copy(update={"ranges": wrong}))
    assert set(Scorer(bundle, card_of(bundle), int8=True).forward.ways) == {"eager", "traced"}


def test_the_fastest_way_is_taken_for_so_many_rows(tmp_path: Path) -> None:
    scorer = Scorer(bundle := plain_bundle(tmp_path / "bundle", "dnn"), card_of(bundle))
    forward = scorer.forward
    forward.seconds = {"eager": {1: 5.0, 100: 6.0, 500: 10.0}, "traced": {1: 1.0, 100: 6.0, 500: 30.0}}
    assert [forward.expected(rows) for rows in (1, 50, 500, 900)] == [
        ("traced", 1.0),
        ("traced", pytest.approx(1 + 5 * 49 / 99)),
        ("eager", 10.0),
        ("eager", 14.0),
    ]
    assert forward.told()["500"] == {"chosen": "eager", "milliseconds": {"eager": 10_000, "traced": 30_000}}
    called: list[str] = []
    one = scorer.encode(**requests(bundle)[0])
    forward.ways = {name: lambda _, name=name: called.append(name) or torch.zeros(1) for name in forward.ways}
    scorer.run([one])
    assert called == ["traced"]


def test_lists_are_not_traced(tmp_path: Path) -> None:
    scorer = Scorer(bundle := example_bundle(tmp_path / "bundle"), card_of(bundle))
    assert set(scorer.forward.ways) == {"eager"}
    assert list(scorer.forward.seconds["eager"]) == list(MEASURED_ROWS)


def test_a_trace_that_does_not_give_the_golden_rows_their_scores_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = plain_bundle(tmp_path / "bundle", "dnn")
    right = CTRModel.__call__

    def off_while_traced(model: CTRModel, *given: Any) -> Any:
        return right(model, *given) + (0.01 if torch.jit.is_tracing() else 0.0)

    monkeypatch.setattr(CTRModel, "__call__", off_while_traced)
    scorer = Scorer(bundle, card_of(bundle))
    assert set(scorer.forward.ways) == {"eager"}


def test_operators_are_fast_again_after_the_trace(tmp_path: Path) -> None:
    bundle = plain_bundle(tmp_path / "bundle", "gdcn")
    fused = [module.fused for module in bundle.model.modules() if hasattr(module, "fused")]
    Scorer(bundle, card_of(bundle))
    assert [m.fused for m in bundle.model.modules() if hasattr(m, "fused")] == fused
    assert any(fused)
