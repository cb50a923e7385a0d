"""What a live experiment shows: stages, intervals, and what is said loudly."""

from __future__ import annotations

import asyncio
import threading
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest

from ctr_models.errors import ConfigError
from pipelines.experiments.experiment import Experiment
from pipelines.experiments.rates import compare_rates
from serving.analysis import LiveResults, Results, analyse
from serving.experiments import Experiments
from serving.totals import Span, totals

NOW = datetime.now(UTC)
START = NOW - timedelta(days=3)
DAY = timedelta(days=1)


def experiment(
    arms: tuple[str, ...] = ("open", "gated"), allocation: tuple[float, ...] = (), **online: Any
) -> Experiment:
    tree: dict[str, Any] = {"name": "gates", "control": "open", "arms": [{"name": arm} for arm in arms]}
    tree["allocation"] = {"weights": dict(zip(arms, allocation, strict=False))}
    return Experiment.from_tree({**tree, "online": {"starts": START.isoformat(), **online}})


def stored(filled: Any, made: Experiment) -> Experiments:
    kept = Experiments(filled.database)
    kept.put(made, at=START - DAY)
    row = filled.database
    with row.engine.begin() as connection:  # as if it had been stored before it began
        connection.exec_driver_sql(
            f"UPDATE sluice_experiments SET created = {int((START - DAY).timestamp() * 1e6)}"
        )
    return kept


def shown(filled: Any, kept: Experiments, **more: Any) -> Results:
    return analyse(filled.database, kept, "gates", **{"at": NOW, **more})


def test_figures_are_those_of_the_engine(filled: Any) -> None:
    kept = stored(
        filled, experiment(guardrails=[{"metric": "ctr", "bound": 0.01}, {"metric": "ctr", "bound": 0.3}])
    )
    filled.traffic({"open": 0.2, "gated": 0.12}, 400, START + DAY)
    found = shown(filled, kept)
    control, gated = found.arms
    assert (control.role, gated.role, control.units, control.shown, control.share) == (
        "control", "challenger", 400, 8000, 0.5
    )  # fmt: skip
    summed, _ = totals(filled.database, Span.of("gates", since=START, until=NOW), ["open", "gated"])
    sums = {arm: one.ctr for arm, one in summed.items()}
    for interval in ("sequential", "fixed"):
        effect = shown(filled, kept, interval=interval).effects[0]
        (d,) = compare_rates(sums, control="open", sequential=interval == "sequential")
        assert (effect.value, effect.low, effect.high, effect.p) == pytest.approx((d.value, d.low, d.high, d.p))
        assert effect.verdict == "worse" and (effect.arm, effect.metric) == ("gated", "ctr")
    assert gated.ctr.low < gated.ctr.value < gated.ctr.high  # type: ignore[operator]
    assert [one.state for one in found.guardrails] == ["broken", "kept"]
    assert "ctr -0.0" in found.guardrails[0].reason and "bound 0.01" in found.guardrails[0].reason
    assert found.problems == [] and found.since == START and not found.sample_ratio.mismatch  # type: ignore[union-attr]
    assert Results.model_validate_json(found.model_dump_json()) == found


def test_a_sample_ratio_mismatch_is_loud(filled: Any) -> None:
    kept = stored(filled, experiment())
    filled.traffic({"open": 0.1}, 400, START + DAY)
    assert "nobody was served by gated" in shown(filled, kept).problems[-1]
    filled.traffic({"gated": 0.1}, 280, START + DAY)
    (problem,) = shown(filled, kept).problems
    assert problem.startswith("SAMPLE RATIO MISMATCH (p = ") and "gated 41.18% instead of 50.00%" in problem


def test_units_in_several_arms_are_loud(filled: Any) -> None:
    kept = stored(filled, experiment())
    filled.traffic({"open": 0.1, "gated": 0.1}, 50, START + DAY)
    for arm in ("open", "gated"):
        filled.show(arm, "both", START + DAY)
    found = shown(filled, kept)
    assert found.mixed_units == 1 and found.problems[0].startswith("UNITS IN SEVERAL ARMS: 1 of 101")


def test_a_change_of_shares_begins_a_new_stage(filled: Any) -> None:
    weights = {"open": 0.5, "gated": 0.5}
    stages = [{"at": (START + 2 * DAY).isoformat(), "weights": {"open": 0.2, "gated": 0.8}}]
    made = experiment(ramp=stages)
    kept = stored(filled, made)
    assert made.stages()[0] == {"open": 1.0, "gated": 1.0} and weights
    filled.traffic({"open": 0.1, "gated": 0.1}, 30, START + DAY)
    filled.traffic({"open": 0.1, "gated": 0.1}, 20, START + 2.5 * DAY, seed=1)
    before, after = shown(filled, kept, at=START + 1.5 * DAY), shown(filled, kept)
    assert (before.arms[0].units, before.since, before.arms[1].share) == (30, START, 0.5)
    assert (after.arms[0].units, after.since, after.arms[1].share) == (20, START + 2 * DAY, 0.8)


def test_a_paused_arm_is_told_and_not_compared_and_resuming_begins_a_new_stage(filled: Any) -> None:
    kept = stored(filled, experiment(("open", "gated", "deep")))
    filled.traffic({"open": 0.1, "gated": 0.1, "deep": 0.1}, 30, START + DAY)
    kept.pause("gates", "gated", "too slow")
    found = shown(filled, kept, at=None)
    assert [arm.paused for arm in found.arms] == [None, "too slow", None]
    assert {one.arm for one in found.effects} == {"deep"} and found.since == START and not found.problems
    assert found.effects[0].confidence == pytest.approx(0.975)  # who drops an arm has looked at it
    assert found.sample_ratio.expected == {"open": 0.5, "deep": 0.5}  # type: ignore[union-attr]
    kept.resume("gates", "gated", "faster")
    found = shown(filled, kept, at=None)
    assert found.since is not None and found.since > NOW and not any(arm.units or arm.paused for arm in found.arms)


def test_a_version_that_deals_alike_goes_on_and_another_begins_anew(filled: Any) -> None:
    kept = stored(filled, experiment())
    filled.traffic({"open": 0.1, "gated": 0.1}, 30, START + DAY)
    kept.put(experiment(guardrails=[{"metric": "ctr", "bound": 0.1}], ends=(NOW + DAY).isoformat()))
    assert (shown(filled, kept, at=None).version, shown(filled, kept, at=None).since) == (2, START)
    assert shown(filled, kept).version == 1
    kept.put(experiment(epsilon=0.1))
    assert shown(filled, kept, at=None).since > NOW  # type: ignore[operator]


def test_shadow_arms_have_requests_and_nobody_clicks_what_they_score(filled: Any) -> None:
    kept = stored(filled, experiment(("open", "gated", "deep"), shadow=["deep"]))
    filled.traffic({"open": 1.0, "gated": 0.1}, 20, START + DAY)
    filled.show("deep", "open-0-1", START + DAY, request="open-0-1")
    found = shown(filled, kept)
    shadow = found.arms[2]
    assert (shadow.role, shadow.requests, shadow.clicks, shadow.ctr.value) == ("shadow", 1, 0, None)
    assert found.mixed_units == 0 and found.arms[0].units == 20 and found.arms[0].clicks == 400


def test_what_comes_after_the_end_changes_no_results_but_late_clicks_count(filled: Any) -> None:
    end = START + 2 * DAY
    ramp = [{"at": at.isoformat(), "weights": {"open": 0.1, "gated": 0.9}} for at in (end, end + DAY / 2)]
    kept = stored(filled, experiment(ends=end.isoformat(), ramp=ramp))
    filled.traffic({"open": 0.1, "gated": 0.1}, 30, START + DAY)
    late = filled.show("open", "open-0-0", end - DAY / 24)
    filled.happen(end + DAY / 24, request_id=late, candidate=0)
    for switch in (kept.pause, kept.resume, kept.pause):  # now, long after the end
        switch("gates", "gated", "tidying up")
    found = shown(filled, kept, at=datetime.now(UTC))
    assert (found.state, found.since, found.until) == ("ended", START, end)
    assert [(arm.units, arm.share, arm.paused) for arm in found.arms] == [(30, 0.5, None)] * 2
    before = shown(filled, kept, at=end)
    assert (found.arms[0].clicks, len(found.effects)) == (before.arms[0].clicks + 1, 1)
    assert not found.problems


def test_times_of_another_zone_are_told_in_utc_and_written_anew_begin_nothing(filled: Any) -> None:
    zone = timezone(timedelta(hours=5, minutes=30))
    kept = stored(filled, experiment(starts=START.astimezone(zone).isoformat()))
    found = shown(filled, kept)
    assert found.since == START and found.since.utcoffset() == timedelta(0)
    kept.put(experiment(primary="conversion_rate"))  # the same start, in UTC
    tree = experiment(primary="ctr").to_tree()
    kept.put(Experiment.from_tree({**tree, "allocation": {"weights": {"open": 1, "gated": 1}}}))  # as by default
    found = shown(filled, kept, at=None)
    assert (found.version, found.since) == (3, START)


def test_an_arm_that_has_too_few_units_yet_shares_alpha(filled: Any) -> None:
    kept = stored(filled, experiment(("open", "gated", "deep", "shut"), allocation=(1, 1, 0.01, 0)))
    filled.traffic({"open": 0.1, "gated": 0.1}, 300, START + DAY)
    filled.traffic({"deep": 0.1}, 5, START + DAY)
    (effect,) = shown(filled, kept).effects
    assert effect.arm == "gated" and effect.confidence == pytest.approx(0.975)


def test_before_there_is_enough_nothing_is_claimed(filled: Any) -> None:
    kept = stored(filled, experiment())
    assert shown(filled, kept).effects == [] and shown(filled, kept).sample_ratio is None
    filled.traffic({"open": 0.5, "gated": 0.5}, 9, START + DAY)
    found = shown(filled, kept)
    assert found.effects == [] and found.arms[0].ctr.low is None and found.arms[0].ctr.value is not None
    early = shown(filled, kept, at=START - DAY / 2)
    assert (early.state, early.since, early.arms[0].units) == ("planned", None, 0)
    with pytest.raises(ConfigError, match="'gates'"):
        analyse(filled.database, kept, "gate")


def test_results_are_kept_for_a_while_but_not_over_a_pause(filled: Any) -> None:
    kept = stored(filled, experiment())
    live = LiveResults(filled.database, kept)

    async def ask() -> None:
        first, second = await asyncio.gather(live.get("gates"), live.get("gates"))
        assert first is second
        kept.pause("gates", "gated", "why not")
        assert (await live.get("gates")).arms[1].paused == "why not"
        assert (await live.get("gates", interval="fixed")).interval == "fixed"

    asyncio.run(ask())


def test_results_that_cost_much_are_given_out_while_they_are_renewed(
    filled: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = stored(filled, experiment())
    live = LiveResults(filled.database, kept)
    begun, go = threading.Event(), threading.Event()
    results = [
        analyse(filled.database, kept, "gates").model_copy(update={"seconds": 60.0, "version": i}) for i in (1, 2)
    ]

    def slow(*_: Any) -> Results:
        if len(results) == 1:
            begun.set()
            assert go.wait(20)
        return results.pop(0)

    monkeypatch.setattr("serving.analysis.analyse", slow)
    monkeypatch.setattr("serving.analysis.REST", 0.0)
    monkeypatch.setattr("serving.analysis.FRESH_SECONDS", 0.0)

    async def ask() -> None:
        assert (await live.get("gates")).version == 1
        assert (await live.get("gates")).version == 1
        await asyncio.to_thread(begun.wait, 20)
        assert (await live.get("gates")).version == 1
        go.set()
        await asyncio.gather(*live._renewing.values())
        assert live._cached["gates"][2].version == 2

    asyncio.run(ask())
