"""Rates of independent arms: the estimate is the engine's, and intervals keep what they promise."""

from __future__ import annotations

import numpy as np
import pytest

from ctr_models.errors import ConfigError, DataError
from pipelines.experiments.rates import Sums, compare_rates, interval_of_rate, sample_ratio_p
from pipelines.experiments.statistics import cluster_robust_mean, holm

ALPHA = 0.05


def users(rng: np.random.Generator, count: int, rate: float) -> tuple[np.ndarray, np.ndarray]:
    """Clicks and candidates shown of users who differ in taste and in how often they come."""
    shown = 5 * rng.poisson(3, size=count) + 5
    return rng.binomial(shown, rng.beta(4 * rate, 4 * (1 - rate), size=count)), shown


def two_arms(rng: np.random.Generator, count: int, rate: float, other: float) -> dict[str, Sums]:
    return {"open": Sums.of(*users(rng, count, rate)), "gated": Sums.of(*users(rng, count, other))}


def test_a_rate_is_the_offline_engines_mean_of_rows_clustered_by_user() -> None:
    rng = np.random.default_rng(1)
    clicks, shown = users(rng, 300, 0.2)
    user = np.repeat(np.arange(300), shown)
    row = np.concatenate([np.arange(n) < x for x, n in zip(clicks, shown, strict=True)]).astype(float)
    offline, live = cluster_robust_mean(row, user), Sums.of(clicks, shown).estimate()
    assert live.value == pytest.approx(offline.value, rel=1e-12)
    assert live.error == pytest.approx(offline.error, rel=1e-9)
    assert live.freedom == offline.freedom


def test_the_fixed_interval_covers_at_one_look() -> None:
    rng = np.random.default_rng(2)
    inside = [
        (d := compare_rates(two_arms(rng, 400, 0.1, 0.12), control="open", sequential=False)[0]).low
        <= 0.02
        <= d.high
        for _ in range(600)
    ]
    assert 0.925 <= np.mean(inside) <= 0.975


def test_the_sequential_interval_holds_at_all_looks_together_and_the_fixed_one_does_not() -> None:
    rng, runs, looks, per = np.random.default_rng(3), 120, 15, 300
    wrong = {True: 0, False: 0}
    for _ in range(runs):
        x, n = users(rng, looks * 2 * per, 0.1)
        told = {True: False, False: False}
        for look in range(1, looks + 1):
            arms = {
                name: Sums.of(x[i : look * 2 * per : 2], n[i : look * 2 * per : 2]) for i, name in enumerate("ab")
            }
            for sequential in told:
                told[sequential] |= compare_rates(arms, control="a", sequential=sequential)[0].verdict != "noise"
        for sequential in told:
            wrong[sequential] += told[sequential]
    assert wrong[True] / runs <= ALPHA
    assert wrong[False] / runs > 3 * ALPHA


def test_a_real_effect_is_found_by_both() -> None:
    rng = np.random.default_rng(4)
    arms = two_arms(rng, 20_000, 0.1, 0.09)
    for sequential in (True, False):
        (d,) = compare_rates(arms, control="open", sequential=sequential)
        assert d.verdict == "worse" and d.low < d.value < d.high < 0 and d.clusters == 40_000
        assert (
            compare_rates(arms, control="open", sequential=sequential, more_is_better=False)[0].verdict == "better"
        )


@pytest.mark.parametrize("sequential", [True, False])
def test_verdicts_agree_with_holm_over_the_challengers(sequential: bool) -> None:
    rng = np.random.default_rng(5)
    arms = {name: Sums.of(*users(rng, 3000, r)) for name, r in {"a": 0.1, "b": 0.1, "c": 0.13, "d": 0.12}.items()}
    found = compare_rates(arms, control="a", sequential=sequential)
    for d, level in zip(found, holm([d.p for d in found], ALPHA), strict=True):
        assert d.confidence == pytest.approx(1 - level)
        assert (d.verdict != "noise") == (d.p < level) == (not d.low <= 0 <= d.high)
    assert [d.verdict for d in found][1] == "better"


def test_who_waits_to_be_compared_shares_alpha() -> None:
    rng = np.random.default_rng(8)
    arms = two_arms(rng, 3000, 0.1, 0.13)
    (d,) = compare_rates(arms, control="open", waiting=2)
    assert d.confidence == pytest.approx(1 - ALPHA / 3)
    dead = {"open": arms["open"], "gated": arms["open"]}
    assert compare_rates(dead, control="open", waiting=2)[0].confidence == pytest.approx(1 - ALPHA / 3)


def test_an_arm_without_an_event_is_not_sure_of_itself() -> None:
    few = {"open": Sums.of([1] * 3 + [0] * 97, [10] * 100), "dead": Sums.of([0] * 100, [10] * 100)}
    many = {"open": Sums.of([1] * 300 + [0] * 700, [10] * 1000), "dead": Sums.of([0] * 1000, [10] * 1000)}
    assert [compare_rates(arms, control="open")[0].verdict for arms in (few, many)] == ["noise", "worse"]


def test_what_is_too_little_is_said_so() -> None:
    enough, few, none = Sums.of([1] * 20, [5] * 20), Sums.of([1] * 9, [5] * 9), Sums.of([0] * 20, [5] * 20)
    with pytest.raises(DataError, match="arm gated: 9 units are too few"):
        compare_rates({"open": enough, "gated": few}, control="open")
    with pytest.raises(DataError, match="arm open: no event of ctr yet"):
        compare_rates({"open": none, "gated": enough}, control="open")
    with pytest.raises(ConfigError, match="did you mean 'open'"):
        compare_rates({"open": enough, "gated": enough}, control="opne")
    with pytest.raises(DataError, match="no event yet"):
        interval_of_rate(none)


def test_the_interval_of_one_arm_stays_a_rate() -> None:
    rng = np.random.default_rng(6)
    sums = Sums.of(*users(rng, 12, 0.05))
    for sequential in (True, False):
        low, high = interval_of_rate(sums, sequential=sequential)
        assert 0 <= low < sums.rate < high <= 1


def test_sample_ratios_are_tested_at_every_look() -> None:
    rng, shares = np.random.default_rng(7), {"a": 0.9, "b": 0.1, "shut": 0.0}
    alarms = 0
    for _ in range(200):
        counts = np.cumsum(rng.binomial(50, 0.1, size=100))
        alarms += any(
            sample_ratio_p({"a": 50 * (i + 1) - int(b), "b": int(b)}, shares) < 0.01 for i, b in enumerate(counts)
        )
    assert alarms / 200 <= 0.02
    assert sample_ratio_p({"a": 9_100, "b": 900}, shares) < 0.05
    assert sample_ratio_p({"a": 92_000, "b": 8_000}, shares) < 1e-6
    assert sample_ratio_p({}, shares) == 1
