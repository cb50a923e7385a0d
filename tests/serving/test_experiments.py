"""Experiments in the database: versions, layers, and what a running one may change."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from ctr_models.errors import ConfigError
from pipelines.experiments.experiment import Experiment
from serving.database import EXPERIMENTS, Database, Unavailable
from serving.experiments import Conflict, Experiments, shares, state

NOW = datetime(2026, 11, 10, tzinfo=UTC)


def experiment(name: str = "gates", weights: dict[str, float] | None = None, **online: Any) -> Experiment:
    arms = [{"name": "open"}, {"name": "gated", "bundle": "models:/clicks@challenger"}]
    tree: dict[str, Any] = {"name": name, "control": "open", "arms": arms, "online": online}
    return Experiment.from_tree({**tree, "allocation": {"weights": weights or {}}})


def stage(days: int, gated: float) -> dict[str, Any]:
    return {"at": (NOW + timedelta(days=days)).isoformat(), "weights": {"open": 1 - gated, "gated": gated}}


@pytest.fixture
def database(events_url: str) -> Database:
    made = Database(events_url)
    made.create()
    return made


@pytest.fixture
def kept(database: Database) -> Experiments:
    return Experiments(database)


def test_what_is_stored_comes_back_in_another_process(kept: Experiments, database: Database) -> None:
    made = experiment(epsilon=0.1, ramp=[stage(1, 0.3)], layer={"name": "ranking", "stop": 0.5})
    assert kept.put(made, at=NOW) == 1
    other = Experiments(database)
    assert not other.router.assign({"user_id": 1}, at=NOW)
    other.refresh()
    assert other.get("gates") == made
    dealt = [[k.router.assign({"user_id": i}, at=NOW) for i in range(50)] for k in (kept, other)]
    assert dealt[0] == dealt[1] and any(dealt[0])


def test_a_new_version_replaces_and_an_equal_one_does_not(kept: Experiments) -> None:
    assert [kept.put(experiment(ramp=ramp), at=NOW) for ramp in ([], [], [stage(1, 0.3)])] == [1, 1, 2]
    (listed,) = kept.list(at=NOW)
    assert (listed["version"], listed["state"], listed["shares"]) == (2, "running", {"open": 0.5, "gated": 0.5})
    assert Experiment.from_tree(listed["experiment"]) == kept.get("gates")


def test_states_and_shares() -> None:
    made = experiment(
        weights={"open": 9, "gated": 1}, starts=NOW, ends=NOW + timedelta(days=9), ramp=[stage(1, 0.3)]
    )
    day = timedelta(days=1)
    assert [state(made, NOW + d * day) for d in (-1, 0, 9)] == ["planned", "running", "ended"]
    assert [shares(made, NOW + d * day)["gated"] for d in (0, 1)] == pytest.approx([0.1, 0.3])
    assert state(Experiment.from_tree({**made.to_tree(), "online": None}), NOW) == "offline"


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"weights": {"open": 1, "gated": 2}}, "weights so far"),
        ({"ramp": [stage(-1, 0.4), stage(1, 0.5)]}, "weights so far"),
        ({"ramp": [stage(-2, 0.3), stage(1, 0.5)]}, "weights so far"),  # as if it had begun earlier
        ({"unit": "session"}, "unit"),
        ({"layer": {"name": "other"}}, "layer"),
        ({"starts": NOW + timedelta(days=1)}, "starts"),
    ],
)
def test_the_past_of_a_running_experiment_stays(kept: Experiments, change: dict[str, Any], what: str) -> None:
    base: dict[str, Any] = {"ramp": [stage(-1, 0.3), stage(1, 0.5)]}
    kept.put(experiment(**base), at=NOW)
    with pytest.raises(Conflict, match=f"'gates' has begun, so its {what} can't change"):
        kept.put(experiment(**{**base, **change}), at=NOW)
    assert kept.put(experiment(ramp=[stage(-1, 0.3), stage(2, 0.9)], epsilon=0.2), at=NOW) == 2


def test_what_has_not_begun_may_change_altogether(kept: Experiments) -> None:
    later = NOW + timedelta(days=1)
    kept.put(experiment(starts=later), at=NOW)
    assert kept.put(experiment(starts=later, unit="session", weights={"open": 1, "gated": 3}), at=NOW) == 2


def test_parts_of_a_layer_must_not_overlap_in_time(kept: Experiments) -> None:
    first = {"name": "ranking", "start": 0.0, "stop": 0.6}
    second = {"name": "ranking", "start": 0.5, "stop": 1.0}
    kept.put(experiment("a", layer=first, ends=NOW + timedelta(days=5)), at=NOW)
    with pytest.raises(Conflict, match="'a' has 0 to 0.6 of layer 'ranking'; take another part or time"):
        kept.put(experiment("b", layer=second), at=NOW)
    kept.put(experiment("b", layer=second, starts=NOW + timedelta(days=5)), at=NOW)
    kept.put(experiment("d", layer={**second, "start": 0.6}, ends=NOW + timedelta(days=5)), at=NOW)


def test_a_layer_is_dealt_by_one_kind_of_unit(kept: Experiments) -> None:
    first, second = ({"name": "ranking", "start": at, "stop": at + 0.5} for at in (0.0, 0.5))
    kept.put(experiment("a", layer=first), at=NOW)
    refused = r"'a' deals layer 'ranking' by 'user_id', not by 'session'; take the same unit or another layer"
    with pytest.raises(Conflict, match=refused):
        kept.put(experiment("b", layer=second, unit="session"), at=NOW)
    kept.put(experiment("b", layer=second), at=NOW)
    dealt = [kept.router.assign({"user_id": i, "session": 7 * i}, at=NOW) for i in range(100)]
    assert {len(one) for one in dealt} == {1} and {one[0].experiment for one in dealt} == {"a", "b"}


def test_two_experiments_never_choose_the_model_of_one_request(kept: Experiments) -> None:
    kept.put(experiment("a", layer={"name": "one"}, model="clicks"), at=NOW)
    for online in ({}, {"layer": {"name": "two"}}, {"model": "clicks"}):
        with pytest.raises(Conflict, match="'a' chooses the model of the same requests; put both into one layer"):
            kept.put(experiment("b", **online), at=NOW)
    kept.put(experiment("b", model="orders"), at=NOW)
    arms = [{"name": "open"}, {"name": "gated"}]
    kept.put(Experiment.from_tree({**experiment("c", epsilon=0.1).to_tree(), "arms": arms}), at=NOW)
    assert len(kept.router.assign({"user_id": 1}, at=NOW, model="clicks")) == 2


def test_two_writers_of_one_version_are_told(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = Experiments(database), Experiments(database)
    insert = database.insert

    def overtaken(rows: Any) -> None:
        monkeypatch.setattr(database, "insert", insert)
        two.put(experiment(epsilon=0.2), at=NOW)
        insert(rows)

    monkeypatch.setattr(database, "insert", overtaken)
    with pytest.raises(Conflict, match="somebody else stored version 1"):
        one.put(experiment(epsilon=0.1), at=NOW)
    assert one.get("gates").online.epsilon == 0.2  # type: ignore[union-attr]


def test_while_the_database_is_away_the_last_known_stay_in_force(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}/events.db")
    database.create()
    kept = Experiments(database)
    kept.put(experiment(), at=NOW)
    (tmp_path / "events.db").rename(tmp_path / "aside.db")
    database.close()
    with pytest.raises(Unavailable):
        kept.refresh()
    with pytest.raises(Unavailable):
        kept.put(experiment("other"), at=NOW)
    assert kept.router.assign({"user_id": 1}, at=NOW)


def test_what_can_not_be_read_does_not_stop_the_others(kept: Experiments, database: Database) -> None:
    kept.put(experiment(), at=NOW)
    row = {"name": "newer", "version": 1, "body": '{"name": "newer", "invented": 1}', "created": 0}
    database.insert([(EXPERIMENTS, row)])
    kept.refresh()
    assert [one["experiment"]["name"] for one in kept.list()] == ["gates"]


def test_mistakes_are_named(kept: Experiments) -> None:
    kept.put(experiment(), at=NOW)
    with pytest.raises(ConfigError, match="did you mean 'gates'"):
        kept.get("gate")
    with pytest.raises(ConfigError, match=r"experiment 'x': the experiment is offline only\. add online"):
        kept.put(Experiment.from_tree({**experiment("x").to_tree(), "online": None}))


def test_a_pause_holds_in_every_process_until_an_explicit_call(kept: Experiments, database: Database) -> None:
    kept.put(experiment(), at=NOW)
    other = Experiments(database)
    first = kept.pause("gates", "gated", "too few clicks")
    assert kept.pause("gates", "gated", "again") == first == other.pause("gates", "gated", "mine")
    assert (first.paused, first.reason, first.number) == (True, "too few clicks", 1)
    for process in (kept, other):
        assert all(
            not a.counted
            for i in range(50)
            for a in process.router.assign({"user_id": i}, at=NOW)
            if a.arm.name != "open"
        )
        assert process.list()[0]["paused"] == {"gated": "too few clicks"}
    kept.put(experiment(epsilon=0.1), at=NOW)
    assert kept.list()[0]["paused"]
    assert other.resume("gates", "gated").number == 2
    kept.refresh()
    assert not kept.list()[0]["paused"]
    assert {a.arm.name for i in range(50) for a in kept.router.assign({"user_id": i}, at=NOW)} == {"open", "gated"}


def test_of_two_that_pause_at_once_the_first_is_kept(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = Experiments(database), Experiments(database)
    one.put(experiment(), at=NOW)
    insert = database.insert

    def overtaken(rows: Any) -> None:
        monkeypatch.setattr(database, "insert", insert)
        two.pause("gates", "gated", "first")
        insert(rows)

    monkeypatch.setattr(database, "insert", overtaken)
    assert one.pause("gates", "gated", "second").reason == "first"


def test_only_an_arm_that_takes_units_from_the_control_can_be_paused(kept: Experiments) -> None:
    kept.put(experiment(), at=NOW)
    for name, arm, known in (
        ("gates", "open", "'gated'"),
        ("gates", "gate", "'gated'"),
        ("gate", "gated", "'gates'"),
    ):
        with pytest.raises(ConfigError, match=known):
            kept.pause(name, arm, "why not")


def test_every_version_is_kept_with_its_time(kept: Experiments) -> None:
    kept.put(experiment(), at=NOW)
    kept.put(experiment(epsilon=0.1), at=NOW)
    (one, first, old), (two, second, new) = kept.versions("gates")
    assert (one, two, old.online.epsilon, new.online.epsilon) == (1, 2, 0, 0.1)  # type: ignore[union-attr]
    assert first <= second <= datetime.now(UTC)
