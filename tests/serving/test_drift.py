"""Live traffic beside training: rates by field, scores, and PSI that tells what moved."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from prometheus_client import CollectorRegistry

from pipelines.release.bundle import Bundle
from pipelines.release.example import example_bundle, example_log
from serving import drift
from serving.drift import Drift
from serving.scorer import Scorer, card_of


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> Scorer:
    bundle = example_bundle(tmp_path_factory.mktemp("made") / "bundle")
    return Scorer(bundle, card_of(bundle))


@pytest.fixture
def look_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drift, "ROWS_A_SECOND", 10**12)


def send(watched: Drift, scorer: Scorer, log: pl.DataFrame) -> np.ndarray:
    """Score each row as a request of its own; return the scores."""
    found = []
    for row in log.drop("click").to_dicts():
        item = {name: row.pop(name) for name in ("item_id", "price", "tags")}
        encoded = scorer.encode(row, {}, [item])
        (scores,) = scorer.run([encoded])
        watched.saw("main", scorer, encoded, scores)
        found.append(scores)
    return np.concatenate(found)


def value(registry: CollectorRegistry, name: str, scorer: Scorer, **labels: str) -> float | None:
    return registry.get_sample_value(name, {"slot": "main", "model": scorer.card.hash[:12], **labels})


@pytest.mark.usefixtures("look_at_all")
def test_missing_and_unknown_values_are_counted_by_field(scorer: Scorer) -> None:
    registry = CollectorRegistry()
    log = example_log(40).with_columns(
        city=pl.Series(["Atlantis"] * 10 + [None] * 5 + ["Graz"] * 25), price=pl.Series([None] * 40)
    )
    send(Drift(registry), scorer, log)
    assert value(registry, "sluice_feature_values_total", scorer, field="city") == 40
    assert value(registry, "sluice_feature_unknown_total", scorer, field="city") == 10
    assert value(registry, "sluice_feature_missing_total", scorer, field="city") == 5
    assert value(registry, "sluice_feature_missing_total", scorer, field="price") == 40
    assert value(registry, "sluice_score_count", scorer) == 40


@pytest.mark.usefixtures("look_at_all")
def test_psi_is_small_for_the_traffic_of_training_and_large_for_what_moved(scorer: Scorer) -> None:
    registry = CollectorRegistry()
    watched = Drift(registry)
    log = pl.concat([example_log(200)] * 3)
    scores = send(watched, scorer, log)
    for field in ("city", "hour", "price", "item_id", "tags"):
        psi = value(registry, "sluice_feature_psi", scorer, field=field)
        assert psi is not None
        assert psi < 0.05, field
    assert value(registry, "sluice_score_psi", scorer) == pytest.approx(0, abs=0.01)
    assert value(registry, "sluice_score_sum", scorer) == pytest.approx(scores.sum(), rel=1e-4)
    send(watched, scorer, pl.concat([log.with_columns(city=pl.lit("Atlantis"))] * 2))
    city = value(registry, "sluice_feature_psi", scorer, field="city")
    hour = value(registry, "sluice_feature_psi", scorer, field="hour")
    assert city is not None
    assert hour is not None
    assert city > 0.5 > 0.05 > hour


@pytest.mark.usefixtures("look_at_all")
def test_few_values_say_nothing(scorer: Scorer) -> None:
    registry = CollectorRegistry()
    send(Drift(registry), scorer, example_log(20))
    assert value(registry, "sluice_score_psi", scorer) is None
    assert value(registry, "sluice_feature_psi", scorer, field="city") is None


@pytest.mark.usefixtures("look_at_all")
def test_a_bundle_without_reference_has_rates_and_no_psi(scorer: Scorer, tmp_path: Path) -> None:
    made = scorer.bundle
    options = {"state": made.state, "config": made.config, "metrics": {}, "golden": example_log(4)}
    old = Bundle.create(tmp_path / "old", model=made.model, **options)
    without, registry = Scorer(old, card_of(old)), CollectorRegistry()
    send(Drift(registry), without, pl.concat([example_log(200)] * 3))
    assert value(registry, "sluice_feature_values_total", without, field="city") == 600
    assert value(registry, "sluice_score_psi", without) is None


@pytest.mark.usefixtures("look_at_all")
def test_windows_forget(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(drift.time, "monotonic", lambda: clock[0])
    registry = CollectorRegistry()
    watched = Drift(registry)
    log = pl.concat([example_log(200)] * 3)
    send(watched, scorer, log.with_columns(city=pl.lit("Atlantis")))
    assert (value(registry, "sluice_feature_psi", scorer, field="city") or 0) > 1
    for _ in range(3):
        clock[0] += drift.WINDOW_SECONDS + 1
        send(watched, scorer, log)
        registry.get_sample_value("sluice_score_count")  # whoever looks makes it count
    assert (value(registry, "sluice_feature_psi", scorer, field="city") or 0) < 0.05


def test_of_much_traffic_some_is_looked_at(scorer: Scorer) -> None:
    registry = CollectorRegistry()
    watched = Drift(registry)
    encoded = scorer.encode({}, {"hour": 9}, [{"item_id": "item-1"}] * 500)
    (scores,) = scorer.run([encoded])
    for _ in range(100):  # a hundred thousandths of what may be seen in this time
        watched.saw("main", scorer, encoded, scores)
    seen = value(registry, "sluice_score_count", scorer)
    assert seen is not None
    assert 500 <= seen < 50_000


@pytest.mark.usefixtures("look_at_all")
def test_another_bundle_begins_anew(scorer: Scorer) -> None:
    registry = CollectorRegistry()
    watched = Drift(registry)
    send(watched, scorer, example_log(10))
    send(watched, Scorer(scorer.bundle, scorer.card), example_log(3))
    assert value(registry, "sluice_score_count", scorer) == 3
