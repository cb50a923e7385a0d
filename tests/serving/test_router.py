"""Who sees which arm: uniform, independent, sticky, and undisturbed by a ramp."""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from pipelines.experiments.experiment import Experiment
from serving.router import POINTS, Router, Segments, order, point, points

NOW = datetime(2026, 11, 10, tzinfo=UTC)
GOLDEN = [2889385346, 3028175797, 3882043344]
RARE = 1e-4
"""Below this p a chi-square test fails; the ids are fixed, so it either always does or never."""


def experiment(name: str = "gates", arms: tuple[str, ...] = ("open", "gated"), **change: Any) -> Experiment:
    online = change.pop("online", {})
    tree = {"name": name, "control": arms[0], "arms": [{"name": a} for a in arms], "online": online, **change}
    return Experiment.from_tree(tree)


@pytest.fixture(scope="module")
def ids() -> pl.Series:
    return pl.int_range(10_000_000, eager=True).cast(pl.String)


def test_ten_million_ids_are_dealt_uniformly_and_independently(ids: pl.Series) -> None:
    weights = [{"a": 0.5, "b": 0.3, "c": 0.15, "d": 0.05}]
    shares = np.array(list(weights[0].values()))
    dealt = []
    for salt in ("arm\0first", "arm\0second"):
        where = points(ids, salt)
        cells = np.bincount(where >> 22, minlength=1024)  # finer than any arm
        assert stats.chisquare(cells).pvalue > RARE
        dealt.append(Segments(weights).codes(where))
        assert stats.chisquare(np.bincount(dealt[-1]), shares * len(ids)).pvalue > RARE
    together = np.bincount(4 * dealt[0] + dealt[1], minlength=16)
    assert stats.chisquare(together, np.outer(shares, shares).ravel() * len(ids)).pvalue > RARE
    # The test can fail: the same salt twice is as dependent as can be.
    same = np.bincount(4 * dealt[0] + dealt[0], minlength=16)
    assert stats.chisquare(same, np.outer(shares, shares).ravel() * len(ids)).pvalue < RARE


@given(st.lists(st.text(max_size=20), min_size=1), st.text(max_size=10))
def test_one_unit_falls_where_it_does_among_many(units: list[str], salt: str) -> None:
    assert [point(unit, salt) for unit in units] == points(pl.Series(units), salt).tolist()


@st.composite
def ramps(draw: st.DrawFn) -> list[dict[str, float]]:
    count = draw(st.integers(2, 5))
    weight = st.floats(0, 100, allow_subnormal=False)
    stage = st.lists(weight, min_size=count, max_size=count).filter(lambda w: sum(w) > 1e-3)
    return [dict(zip("abcde", weights, strict=False)) for weights in draw(st.lists(stage, min_size=1, max_size=6))]


@settings(max_examples=200)
@given(ramps())
def test_a_change_of_weights_moves_no_more_than_it_must(ramp: list[dict[str, float]]) -> None:
    edges = set()
    for i in range(1, len(ramp) + 1):
        edges |= set(Segments(ramp[:i])._starts)
    starts = np.array(sorted(edges))
    sizes = np.diff(np.append(starts, POINTS))
    before = None
    for i, stage in enumerate(ramp):
        owner = Segments(ramp[: i + 1]).codes(starts)
        shares = np.bincount(owner, weights=sizes, minlength=len(stage)) / POINTS
        assert shares == pytest.approx(np.array(list(stage.values())) / sum(stage.values()), abs=1e-8)
        if before is not None:
            moved = sizes[owner != before[0]].sum() / POINTS
            assert moved == pytest.approx(np.abs(shares - before[1]).sum() / 2, abs=1e-8)
        before = owner, shares


def test_a_ramp_keeps_everybody_in_the_arm_that_grows() -> None:
    first = {"open": 98, "gated": 1, "deep": 1}
    ramp = [
        {"at": "2026-11-01T00:00:00Z", "weights": {"open": 90, "gated": 9, "deep": 1}},
        {"at": "2026-11-02T00:00:00Z", "weights": {"open": 50, "gated": 25, "deep": 25}},
    ]
    router = Router([experiment(arms=tuple(first), allocation={"weights": first}, online={"ramp": ramp})])
    times = [datetime(2026, 10, 31, tzinfo=UTC), datetime(2026, 11, 1, tzinfo=UTC), NOW]
    dealt = [np.array([router.assign({"user_id": i}, at=at)[0].arm.name for i in range(5000)]) for at in times]
    shares = [[(d == name).mean() for name in first] for d in dealt]
    np.testing.assert_allclose(shares, [[0.98, 0.01, 0.01], [0.9, 0.09, 0.01], [0.5, 0.25, 0.25]], atol=0.02)
    for before, after in pairwise(dealt):
        assert set(before[before != after]) == {"open"}
    assert set(dealt[0][dealt[0] != dealt[1]]) == {"open"} and set(dealt[1][dealt[0] != dealt[1]]) == {"gated"}


def test_every_process_of_every_release_deals_alike() -> None:
    # Computed once, in another process: whoever changes the hash moves everybody in every running experiment.
    assert [point(unit, "salt") for unit in ("0", "user 7", "Łódź")] == GOLDEN


def test_experiments_of_a_layer_exclude_each_other_and_layers_overlap() -> None:
    def part(name: str, layer: str, start: float, stop: float) -> Experiment:
        return experiment(name, online={"layer": {"name": layer, "start": start, "stop": stop}})

    router = Router([part("a", "one", 0, 0.5), part("b", "one", 0.5, 1), part("c", "two", 0, 0.5)])
    found = [{a.experiment for a in router.assign({"user_id": i}, at=NOW)} for i in range(8000)]
    assert all(len(f & {"a", "b"}) == 1 for f in found)
    both = [sum(("a" in f) == x and ("c" in f) == y for f in found) for x in (True, False) for y in (True, False)]
    assert stats.chisquare(both).pvalue > RARE


def test_arms_are_independent_of_layer_and_holdout() -> None:
    layer = {"name": "one", "start": 0.2, "stop": 0.7}
    router = Router([experiment(online={"layer": layer, "holdout": 0.2})])
    found = [router.assign({"user_id": i}, at=NOW) for i in range(20_000)]
    inside = [f[0].arm.name for f in found if f]
    assert len(inside) / len(found) == pytest.approx(0.5 * 0.8, abs=0.015)
    assert inside.count("open") / len(inside) == pytest.approx(0.5, abs=0.02)


def test_a_layer_leaves_out_the_same_units() -> None:
    one, two = (experiment(n, online={"layer": {"name": "l"}, "holdout": h}) for n, h in (("a", 0.1), ("b", 0.3)))
    a, b = Router([one]), Router([two])
    left = [(not a.assign({"user_id": i}, at=NOW), not b.assign({"user_id": i}, at=NOW)) for i in range(3000)]
    assert 200 < sum(x for x, _ in left) < 400 and all(y for x, y in left if x)


def test_who_is_not_in_the_experiment() -> None:
    online = {
        "model": "clicks",
        "unit": "account",
        "starts": "2026-11-01T00:00:00Z",
        "ends": "2026-12-01T00:00:00Z",
    }
    router = Router([experiment(online=online, population=[{"column": "age", "least": 18}])])
    fits = {"account": "x", "age": 20}
    assert router.assign(fits, at=NOW, model="clicks")
    assert not router.assign(fits, at=NOW, model="orders")
    assert not router.assign(fits, at=datetime(2026, 10, 1, tzinfo=UTC), model="clicks")
    assert not router.assign(fits, at=datetime(2026, 12, 1, tzinfo=UTC), model="clicks")
    for change in (
        {"age": 17},
        {"age": "old"},
        {"age": None},
        {"account": None},
        {"account": [1]},
        {"account": ""},
    ):
        assert not router.assign({**fits, **change}, at=NOW, model="clicks")
    assert not Router([experiment(online=None)]).assign({"user_id": 1}, at=NOW)


def test_a_number_and_its_text_are_one_unit_and_shadow_arms_come_along() -> None:
    router = Router([experiment(arms=("open", "gated", "deep"), online={"shadow": ["deep"]})])
    for i in range(50):
        number, text = (router.assign({"user_id": u}, at=NOW)[0] for u in (i, str(i)))
        assert number == text and number.arm.name in ("open", "gated")
        assert [arm.name for arm in number.shadows] == ["deep"]


def test_random_orders_are_uniform_and_their_propensities_true() -> None:
    scores, epsilon, requests = np.array([0.2, 0.9, 0.5, 0.5]), 0.4, 20_000
    made = [order(scores, epsilon=epsilon, seed=str(i)) for i in range(requests)]
    positions = np.stack([p for p, _ in made])
    ranks = [3, 0, 1, 2]
    for candidate, rank in enumerate(ranks):
        seen = np.bincount(positions[:, candidate], minlength=4)
        truth = np.full(4, epsilon / 4)
        truth[rank] += 1 - epsilon
        assert stats.chisquare(seen, truth * requests).pvalue > RARE
        np.testing.assert_allclose(
            [made[i][1][candidate] for i in range(100)], truth[positions[:100, candidate]], rtol=1e-12
        )
    shuffled = positions[(positions != ranks).any(axis=1)]
    orders = np.bincount(shuffled @ [64, 16, 4, 1])
    assert stats.chisquare(orders[orders > 0]).pvalue > RARE and (orders > 0).sum() == 23
    assert (order(scores, epsilon=epsilon, seed="7")[0] == positions[7]).all()


def test_units_of_a_paused_arm_are_served_by_the_control_outside_the_experiment_and_nobody_else_moves() -> None:
    made = [experiment("gates", ("open", "gated", "deep"), online={"epsilon": 0.5}), experiment("other")]
    before, after = Router(made), Router(made, {("gates", "gated")})
    moved = 0
    for i in range(300):
        old, new = (router.assign({"user_id": i}, at=NOW) for router in (before, after))
        assert old[1] == new[1]
        if old[0].arm.name == "gated":
            moved += 1
            assert (new[0].arm.name, new[0].counted, new[0].epsilon) == ("open", False, 0.0)
        else:
            assert new[0] == old[0] and new[0].counted
    assert 60 < moved < 140


def test_ids_that_no_index_can_hold_are_no_ids() -> None:
    router = Router([experiment()])
    assert router.assign({"user_id": "x" * 256}, at=NOW) and not router.assign({"user_id": "x" * 257}, at=NOW)
