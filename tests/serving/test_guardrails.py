"""Guardrails that act: once, for a reason that is kept, until somebody resumes the arm."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from pipelines.experiments.experiment import Experiment
from serving.database import Unavailable
from serving.experiments import Experiments
from serving.guardrails import Guardrails, PausedArms, check

NOW = datetime.now(UTC)
START = NOW - timedelta(days=1)


def experiment(**online: Any) -> Experiment:
    rails = [{"metric": "ctr", "bound": 0.02}, {"metric": "conversion_rate", "bound": 0.01}]
    arms = [{"name": name} for name in ("open", "gated", "deep")]
    online = {"starts": START.isoformat(), "guardrails": rails, **online}
    return Experiment.from_tree({"name": "gates", "control": "open", "arms": arms, "online": online})


@pytest.fixture
def kept(filled: Any) -> Experiments:
    made = Experiments(filled.database)
    made.put(experiment(), at=START - timedelta(days=1))
    with filled.database.engine.begin() as connection:
        connection.exec_driver_sql(f"UPDATE sluice_experiments SET created = {int(START.timestamp() * 1e6)}")
    return made


def arms_of(kept: Experiments) -> set[str]:
    dealt = (kept.router.assign({"user_id": i}, at=datetime.now(UTC)) for i in range(60))
    return {a.arm.name for one in dealt for a in one if a.counted}


def test_an_arm_that_surely_harms_is_paused_once_and_stays_so(filled: Any, kept: Experiments) -> None:
    filled.traffic({"open": 0.2, "gated": 0.12, "deep": 0.19}, 400, NOW - timedelta(hours=2))
    ((breach,), seconds) = check(filled.database, kept)
    assert (breach.experiment, breach.arm) == ("gates", "gated") and seconds > 0
    assert breach.reason.startswith("guardrail: ctr -0.0") and "bound 0.02" in breach.reason
    assert arms_of(kept) == {"open", "deep"}
    other = Experiments(filled.database)
    assert check(filled.database, other)[0] == [] and arms_of(other) == {"open", "deep"}
    # It never resumes by itself, whatever comes.
    filled.traffic({"gated": 0.9}, 400, NOW - timedelta(hours=1), seed=1)
    assert check(filled.database, other)[0] == [] and arms_of(other) == {"open", "deep"}
    kept.resume("gates", "gated", "mended")
    assert check(filled.database, kept)[0] == [] and arms_of(kept) == {"open", "gated", "deep"}
    assert [(arm, pause.paused) for arm, pause in kept.pause_log("gates")] == [("gated", True), ("gated", False)]


def test_what_may_be_chance_pauses_nobody(filled: Any, kept: Experiments) -> None:
    filled.traffic({"open": 0.2, "gated": 0.12, "deep": 0.2}, 30, NOW - timedelta(hours=2))
    assert check(filled.database, kept)[0] == [] and arms_of(kept) == {"open", "gated", "deep"}


def test_an_experiment_that_does_not_run_is_left_alone(filled: Any, kept: Experiments) -> None:
    filled.traffic({"open": 0.2, "gated": 0.0, "deep": 0.2}, 400, NOW - timedelta(hours=2))
    kept.put(experiment(ends=(NOW - timedelta(seconds=1)).isoformat()))
    assert check(filled.database, kept)[0] == []


def test_servers_check_by_themselves_and_one_of_them_is_enough(
    filled: Any, kept: Experiments, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled.traffic({"open": 0.2, "gated": 0.1, "deep": 0.2}, 400, NOW - timedelta(hours=2))
    claims: list[bool] = []
    claim = filled.database.claim

    def watched(name: str, seconds: float) -> bool:
        claims.append(claim(name, 60))
        if len(claims) == 1:
            raise Unavailable("away for once")
        return claims[-1]

    monkeypatch.setattr(filled.database, "claim", watched)
    with filled.database.engine.begin() as connection:
        connection.exec_driver_sql("DELETE FROM sluice_claims")

    async def run() -> None:
        watchers = [asyncio.create_task(Guardrails(filled.database, kept, 0.05).watch()) for _ in range(2)]
        end = asyncio.get_running_loop().time() + 30
        while len(claims) < 4 and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.02)
        for watcher in watchers:
            watcher.cancel()
        await asyncio.gather(*watchers, return_exceptions=True)

    asyncio.run(run())
    assert claims.count(True) == 1
    with filled.database.engine.begin() as connection:
        connection.exec_driver_sql("DELETE FROM sluice_claims")
    claims[:] = [True]  # from now on nobody is away

    async def once() -> None:
        watcher = asyncio.create_task(Guardrails(filled.database, kept, 0.05).watch())
        end = asyncio.get_running_loop().time() + 30
        while not kept.paused("gates") and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.02)
        watcher.cancel()
        await asyncio.gather(watcher, return_exceptions=True)

    asyncio.run(once())
    assert kept.paused("gates")["gated"].paused


def test_the_metric_tells(kept: Experiments) -> None:
    registry = CollectorRegistry()
    registry.register(PausedArms(kept))
    labels = {"experiment": "gates", "arm": "gated"}
    assert registry.get_sample_value("sluice_arm_paused", labels) is None
    for paused in (True, False):
        (kept.pause if paused else kept.resume)("gates", "gated", "so")
        assert registry.get_sample_value("sluice_arm_paused", labels) == float(paused)
