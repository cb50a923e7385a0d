from __future__ import annotations

import time

import numpy as np
import pytest
from scipy import stats

from ctr_models.errors import ConfigError, DataError
from pipelines.evaluation.metrics import auc, gauc, logloss
from pipelines.experiments import statistics
from pipelines.experiments.statistics import (
    bootstrap,
    cluster_robust_mean,
    compare,
    compare_means,
    estimate,
    holm,
    weighted_auc,
    weighted_mean,
)


def world(rows=6000, users=400, seed=0):
    """Labels, users and true log-odds; a user's rows share a taste."""
    rng = np.random.default_rng(seed)
    user = rng.integers(0, users, rows)
    logit = rng.normal(-1, 1, rows) + rng.normal(0, 0.7, users)[user]
    return rng.random(rows) < 1 / (1 + np.exp(-logit)), user, logit


def noisy(logit, noise, seeds, seed):
    rng = np.random.default_rng(seed)
    return 1 / (1 + np.exp(-(logit + rng.normal(0, noise, (seeds, len(logit))))))


@pytest.mark.parametrize("levels", [5, 10_000])
def test_weighted_auc_equals_auc_of_repeated_rows(levels):
    rng = np.random.default_rng(1)
    user, y = rng.integers(0, 30, 300), rng.random(300) < 0.3
    score = rng.integers(0, levels, 300) / levels
    weights = rng.poisson(1.0, (30, 7)).astype(float)
    found = weighted_auc(y, score, user, 30)(weights)
    for column, value in zip(weights.T.astype(int), found, strict=True):
        rows = np.repeat(np.arange(300), column[user])
        assert value == pytest.approx(auc(y[rows], score[rows]), abs=1e-12)


def test_weighted_auc_does_not_depend_on_its_chunks(monkeypatch):
    y, user, logit = world(500, 40)
    weights = np.random.default_rng(0).poisson(1.0, (40, 23)).astype(float)
    whole = weighted_auc(y, logit, user, 40)(weights)
    monkeypatch.setattr(statistics, "CELLS", 700)
    assert weighted_auc(y, logit, user, 40)(weights) == pytest.approx(whole, abs=1e-14)


def test_the_differences_are_those_of_the_metrics():
    y, user, logit = world()
    arms = {"a": noisy(logit, 1.0, 2, 1), "b": noisy(logit, 0.5, 2, 2)}
    found = {d.metric: d for d in compare(y, user, arms, control="a", metrics=("auc", "logloss", "gauc"))}
    for name, metric in (("auc", auc), ("logloss", logloss), ("gauc", lambda y, p: gauc(y, p, user))):
        expected = np.mean([metric(y, b) - metric(y, a) for a, b in zip(arms["a"], arms["b"], strict=True)])
        assert found[name].value == pytest.approx(expected, abs=1e-12)
        assert found[name].low < found[name].value < found[name].high
        assert found[name].verdict == "better"
        assert (found[name].seeds, found[name].clusters, found[name].rows) == (2, 400, 6000)


def test_worse_is_worse_on_both_kinds_of_metric():
    y, user, logit = world()
    arms = {"a": noisy(logit, 0.5, 1, 1), "b": noisy(logit, 1.5, 1, 2)}
    assert [d.verdict for d in compare(y, user, arms, control="a")] == ["worse", "worse"]


def test_an_arm_against_itself_is_noise():
    y, user, logit = world()
    p = noisy(logit, 0.5, 3, 1)
    for d in compare(y, user, {"a": p, "b": p}, control="a", resamples=200):
        assert (d.value, d.low, d.high, d.p, d.verdict) == (0, 0, 0, 1, "noise")


def test_challengers_may_have_controls_of_their_own_and_share_alpha_all_the_same():
    y, user, logit = world()
    arms = {name: noisy(logit, 1 - 0.1 * i, 2, i) for i, name in enumerate("abcd")}
    found = compare(y, user, arms, control={"b": "a", "d": "c"}, metrics=("auc",), resamples=300)
    assert [(d.challenger, d.control) for d in found] == [("b", "a"), ("d", "c")]
    for d in found:
        ours, its = arms[d.challenger], arms[d.control]
        by_hand = np.mean([auc(y, p) - auc(y, q) for p, q in zip(ours, its, strict=True)])
        assert d.value == pytest.approx(by_hand, abs=1e-12)
        alone = compare(y, user, {d.control: its, d.challenger: ours}, control=d.control, metrics=("auc",))[0]
        assert d.p == pytest.approx(alone.p, abs=0.01)
    assert [d.confidence for d in found] == [1 - level for level in holm([d.p for d in found], 0.05)]
    same = compare(y, user, arms, control=dict.fromkeys("bcd", "a"), resamples=100)
    assert same == compare(y, user, arms, control="a", resamples=100)


def test_same_seed_same_interval_and_another_differs_little():
    y, user, logit = world()
    arms = {"a": noisy(logit, 1.0, 1, 1), "b": noisy(logit, 0.9, 1, 2)}
    one, again, other = (compare(y, user, arms, control="a", seed=s)[0] for s in (0, 0, 1))
    assert one == again
    assert other.high - other.low == pytest.approx(one.high - one.low, rel=0.15)


def test_bootstrap_agrees_with_the_sandwich_and_with_mixed_effects():
    """The means' error three ways: resampling, our sandwich, statsmodels' cluster-robust regression."""
    import statsmodels.api as sm

    rng = np.random.default_rng(3)
    user = np.sort(rng.integers(0, 500, 5000))
    difference = rng.normal(0, 1, 5000) + rng.normal(0, 0.8, 500)[user]
    base = rng.normal(size=5000)
    boot = compare_means({"a": base, "b": base + difference}, user, control="a", resamples=2000)[0]
    sandwich = cluster_robust_mean(difference, user)
    model = sm.OLS(difference, np.ones(5000)).fit(cov_type="cluster", cov_kwds={"groups": user})
    assert boot.value == pytest.approx(sandwich.value)
    assert sandwich.error == pytest.approx(float(model.bse[0]), rel=1e-3)
    low, high = sandwich.interval(0.05)
    assert boot.high - boot.low == pytest.approx(high - low, rel=0.08)
    naive = difference.std(ddof=1) / 5000**0.5
    assert sandwich.error > 1.5 * naive  # rows of a user are not independent


def test_bootstrap_of_auc_agrees_with_delong():
    y, _, logit = world(3000)
    p = noisy(logit, 0.5, 1, 1)[0]
    positive, negative = p[y], p[~y]
    wins = (positive[:, None] > negative[None, :]).astype(float)
    delong = (wins.mean(1).var(ddof=1) / y.sum() + wins.mean(0).var(ddof=1) / (~y).sum()) ** 0.5
    draws = bootstrap([weighted_auc(y, p, np.arange(3000), 3000)], 3000, resamples=1000, seed=0)
    assert draws.std() == pytest.approx(delong, rel=0.08)


def coverage(seeds, per_seed, per_row, repeats=300, users=80, rows=5, effect=0.1):
    """How often the interval holds the true difference of a mean."""
    held = 0
    user = np.repeat(np.arange(users), rows)
    for repeat in range(repeats):
        rng = np.random.default_rng([seeds, repeat])
        taste = rng.normal(0, 0.3, users)[user]
        runs = [effect + taste + rng.normal(0, per_seed) + rng.normal(0, per_row, len(user)) for _ in range(seeds)]
        arms = {"a": np.zeros((seeds, len(user))), "b": np.stack(runs)}
        d = compare_means(arms, user, control="a", resamples=150, seed=repeat)[0]
        held += d.low <= effect <= d.high
    return held / repeats


@pytest.mark.parametrize(
    ("seeds", "per_seed", "per_row"),
    [(1, 0.0, 0.5), (3, 0.0, 0.5), (3, 0.05, 0.5), (3, 0.2, 0.5), (5, 0.05, 3.0), (5, 0.3, 0.5)],
)
def test_intervals_cover_what_they_promise(seeds, per_seed, per_row):
    """95 % nominal; with 300 repeats chance alone spreads it by 1.3 % (one standard deviation)."""
    assert 0.89 <= coverage(seeds, per_seed, per_row) <= 1.0


def test_one_seed_alone_does_not_cover_training_again():
    """Why several seeds: the same effects seen through one seed are missed far too often."""
    assert coverage(1, 0.3, 0.5) < 0.6


def test_no_effect_on_auc_is_found_five_times_in_a_hundred_at_most():
    """Two arms of equal quality, users shared: every verdict other than noise is an error."""
    wrong = 0
    for repeat in range(100):
        y, user, logit = world(800, 100, seed=repeat)
        arms = {"a": noisy(logit, 0.8, 1, [repeat, 1]), "b": noisy(logit, 0.8, 1, [repeat, 2])}
        wrong += compare(y, user, arms, control="a", metrics=("auc",), resamples=150)[0].verdict != "noise"
    assert wrong <= stats.binom.ppf(0.999, 100, 0.05)


def test_holm_shares_alpha_and_intervals_agree_with_verdicts():
    assert holm([0.04, 0.03], 0.05) == [0.025, 0.025]  # neither holds, although both p are below alpha
    assert holm([0.04, 0.01], 0.05) == [0.05, 0.025]  # the second does, and frees alpha for the first
    assert holm([0.9], 0.05) == [0.05]
    y, user, logit = world()
    arms = {"a": noisy(logit, 1.0, 1, 1)} | {f"b{i}": noisy(logit, 1.0 - 0.07 * i, 1, 2 + i) for i in range(5)}
    found = compare(y, user, arms, control="a", metrics=("auc",))
    levels = dict(zip([d.challenger for d in found], holm([d.p for d in found], 0.05), strict=True))
    for d in found:
        assert d.confidence == pytest.approx(1 - levels[d.challenger])
        assert (d.verdict == "noise") == (d.low <= 0 <= d.high) == (d.p >= levels[d.challenger])
    assert {d.verdict for d in found} == {"noise", "better"}


def test_estimate_counts_few_seeds_as_few():
    draws = np.random.default_rng(0).normal(0, 1e-6, (500, 3))
    e = estimate(np.array([0.1, 0.2, 0.3]), draws, 1000)
    assert e.value == pytest.approx(0.2)
    assert e.error == pytest.approx(0.1 / 3**0.5, rel=1e-3)
    assert e.freedom == pytest.approx(2, rel=1e-3)
    assert e.interval(0.05) == pytest.approx(stats.t.interval(0.95, 2, 0.2, 0.1 / 3**0.5), rel=1e-3)


def test_a_hundred_thousand_rows_take_seconds():
    y, user, logit = world(100_000, 5000)
    arms = {"a": noisy(logit, 0.5, 1, 1), "b": noisy(logit, 0.45, 1, 2)}
    begin = time.process_time()
    compare(y, user, arms, control="a", resamples=1000)
    assert time.process_time() - begin < 20  # 2 s on an idle core


def test_weighted_mean_weighs_rows_and_clusters():
    statistic = weighted_mean(np.array([1.0, 2.0, 6.0]), np.array([1.0, 1.0, 2.0]), np.array([0, 0, 1]), 2)
    assert statistic(np.array([[1.0, 2.0], [1.0, 0.0]])).tolist() == [15 / 4, 1.5]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"control": "c"}, ConfigError, "control: no arm 'c'"),
        ({"control": {"b": "c"}}, ConfigError, "control: no arm 'c'"),
        ({"control": {"c": "a"}}, ConfigError, "control: no arm 'c'"),
        ({"metrics": ("acu",)}, ConfigError, "metrics: no interval for metric 'acu'. did you mean 'auc'?"),
        ({"cluster": np.zeros(6000)}, DataError, "1 clusters are too few to tell chance from difference"),
        (
            {"predictions": {"a": np.full((2, 6000), 0.5), "b": np.full((1, 6000), 0.5)}},
            DataError,
            "arm b: predictions",
        ),
        ({"predictions": {"a": np.full(6000, 0.5), "b": np.full(6000, np.nan)}}, DataError, "score is NaN"),
        ({"label": np.ones(6000)}, DataError, "all 6000 labels are 1"),
    ],
)
def test_bad_input_is_named(change, error, message):
    y, user, logit = world()
    given = {
        "label": y,
        "cluster": user,
        "predictions": {"a": noisy(logit, 1, 1, 1), "b": noisy(logit, 1, 1, 2)},
        "control": "a",
        **change,
    }
    with pytest.raises(error, match=message.replace("?", r"\?")):
        compare(given.pop("label"), given.pop("cluster"), given.pop("predictions"), **given)


def test_gauc_where_no_user_has_both_labels_is_an_error():
    y = np.arange(40) % 2 == 0
    p = np.random.default_rng(0).random(40)
    with pytest.raises(DataError, match="gauc is undefined on these rows"):
        compare(y, np.arange(40), {"a": p, "b": p}, control="a", metrics=("gauc",))
