"""Rankings judged by requests in random order: as the database sums them, and against a truth that is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pytest

from pipelines.experiments.rates import Sums, interval_of_rate
from serving.analysis import analyse
from serving.database import ASSIGNMENTS, EVENTS, Row
from serving.experiments import Experiment, Experiments
from serving.off_policy import Ranking, matched, ranked
from serving.router import ranks
from serving.totals import Span

NOW = datetime(2026, 11, 10, tzinfo=UTC)
HOUR = timedelta(hours=1)
ARMS = ("open", "gated")
PLACES = 6
SEEN = 1 / (1 + np.arange(PLACES))
"""Chance that somebody looks at a position."""


@dataclass
class World:
    """Requests in random order, their clicks, and the scores of two arms: one knows what is clicked, one does not.

    Arrays are (requests, candidates).
    """

    scores: dict[str, np.ndarray]
    positions: np.ndarray
    clicks: np.ndarray
    chance: np.ndarray

    @classmethod
    def made(cls, rng: np.random.Generator, requests: int) -> World:
        chance = rng.beta(1, 3, size=(requests, PLACES))
        scores = {"gated": chance + rng.normal(0, 0.1, chance.shape), "open": rng.random(chance.shape)}
        positions = rng.permuted(np.tile(np.arange(PLACES), (requests, 1)), axis=1)
        return cls(scores, positions, rng.random(chance.shape) < chance * SEEN[positions], chance)

    def best(self, arm: str) -> np.ndarray:
        return np.stack([ranks(one) for one in self.scores[arm]])

    def truth(self, arm: str) -> float:
        """The click rate if the arm's ranking were shown."""
        return float((self.chance * SEEN[self.best(arm)]).mean())

    def sums(self, arm: str, units: np.ndarray) -> Sums:
        hit = PLACES * (self.positions == self.best(arm))
        x, n = (np.bincount(units, weights=w.sum(1)) for w in (hit * self.clicks, hit))
        return Sums.of(x[n > 0], n[n > 0])


@pytest.fixture(scope="module")
def truth() -> dict[str, float]:
    world = World.made(np.random.default_rng(1), 20_000)
    return {arm: world.truth(arm) for arm in ARMS}


def test_the_interval_covers_what_a_ranking_would_bring_and_the_plain_rate_does_not(
    truth: dict[str, float],
) -> None:
    covered = dict.fromkeys(ARMS, 0)
    plain = dict.fromkeys(ARMS, 0)
    rng, rounds = np.random.default_rng(2), 60
    units = np.arange(400) // 2
    for _ in range(rounds):
        world = World.made(rng, 400)
        shown = np.full(200, 2.0 * PLACES)
        naive = interval_of_rate(Sums.of(np.bincount(units, world.clicks.sum(1)), shown), sequential=False)
        for arm in ARMS:
            low, high = interval_of_rate(world.sums(arm, units), sequential=False)
            covered[arm] += low <= truth[arm] <= high
            plain[arm] += naive[0] <= truth[arm] <= naive[1]
    assert truth["gated"] > 1.3 * truth["open"]
    assert all(count >= 0.85 * rounds for count in covered.values()), covered
    # Of a ranking that knows nothing, random order is as good; of one that does, it is not.
    assert plain["gated"] <= 0.05 * rounds, plain


def stored(filled: Any, world: World, arms: tuple[str, ...], units: np.ndarray) -> None:
    """Put a world into the database as servers would have: clicks by place, by item, or both."""
    rows: list[Row] = []
    for i, (positions, unit) in enumerate(zip(world.positions, units.tolist(), strict=True)):
        items = [f"item-{j}" for j in range(PLACES)]
        for arm in arms:
            about = {"experiment": "gates", "arm": arm, "unit": f"u{unit}", "exposure_id": f"{arm}-{i}"}
            about |= {"time": round((NOW + HOUR).timestamp() * 1e6) + i, "request_id": f"r{i}", "shown": PLACES}
            rows.append((ASSIGNMENTS, about))
            rows += matched(rows[-1:], world.scores[arm][i], positions, items)
        for j in np.flatnonzero(world.clicks[i]).tolist():
            names: list[dict[str, Any]] = [{"candidate": j}, {"item": items[j]}]
            for k, name in enumerate(names if (i + j) % 3 == 2 else [names[(i + j) % 3]]):
                event = {"event_id": f"{i}-{j}-{k}", "type": "click", "request_id": f"r{i}", "received": 0}
                rows.append((EVENTS, {**event, **name, "time": round((NOW + 2 * HOUR).timestamp() * 1e6)}))
    filled.database.insert(rows)


def test_the_database_sums_weights_and_clicks_by_unit(filled: Any, truth: dict[str, float]) -> None:
    world, units = World.made(np.random.default_rng(3), 400), np.arange(400) // 2
    stored(filled, world, ARMS, units)
    for arm in ARMS:
        matched = int((world.positions == world.best(arm)).any(axis=1).sum())
        assert told(filled, [arm]) == {arm: Ranking(matched, world.sums(arm, units))}
    assert told(filled, ARMS) == {}  # every unit saw both
    assert told(filled, ARMS[:1], until=NOW + HOUR) == {}
    assert told(filled, ARMS[:1], window=HOUR / 2)["open"].ctr.x == 0
    assert told(filled, ARMS, experiment="other") == {}


def told(filled: Any, arms: Sequence[str], *, experiment: str = "gates", **more: Any) -> dict[str, Ranking]:
    span = Span.of(experiment, **{"since": NOW, "until": NOW + 24 * HOUR, **more})
    return ranked(filled.database, span, arms)


def test_results_say_what_a_shadow_arm_would_bring(filled: Any, truth: dict[str, float]) -> None:
    made = {"name": "gates", "control": "open", "arms": [{"name": arm} for arm in (*ARMS, "none")]}
    online = {"starts": NOW.isoformat(), "shadow": ["gated"], "epsilon": 0.5}
    kept = Experiments(filled.database)
    kept.put(Experiment.from_tree({**made, "online": online}), at=NOW - HOUR)
    with filled.database.engine.begin() as connection:  # as if it had been stored before it began
        connection.exec_driver_sql(
            f"UPDATE sluice_experiments SET created = {round((NOW - HOUR).timestamp() * 1e6)}"
        )
    kept.refresh()
    stored(filled, World.made(np.random.default_rng(4), 600), ARMS, np.arange(600))
    found = analyse(filled.database, kept, "gates", at=NOW + 24 * HOUR, interval="fixed")
    control, shadow, nobody = found.arms
    assert shadow.role == "shadow" and shadow.ctr.value is None
    for arm in (control, shadow):
        one = arm.off_policy_ctr
        assert one.low is not None and one.high is not None and one.low < truth[arm.name] < one.high
    assert nobody.off_policy_ctr.value is None and nobody.off_policy_requests == 0
    assert 300 < shadow.off_policy_requests < 600  # of random orders, 1/e have no match
    assert found.epsilon == 0.5 and found.estimated
    assert shadow.off_policy_ctr.low > control.off_policy_ctr.value  # type: ignore[operator]
