"""What a running experiment shows: rates of its arms, differences from the control, and what makes them doubtful.

Results are of one stage: a span of time in which units were dealt in one way. They begin anew when shares change,
when an arm is resumed and when a new version deals otherwise: sums over a change of shares would compare arms on
different days.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ctr_models.errors import DataError
from pipelines.experiments.experiment import Experiment, OnlineGuardrail, OnlineMetric
from pipelines.experiments.rates import NOTHING, Sums, compare_rates, interval_of_rate, sample_ratio_p
from pipelines.experiments.statistics import MIN_CLUSTERS, Difference
from serving.database import Database, horizon
from serving.experiments import Experiments, Pause, shares, state
from serving.off_policy import Ranking, ranked
from serving.totals import Span, Totals, scored, totals

Interval = Literal["sequential", "fixed"]
METRICS: tuple[OnlineMetric, ...] = ("ctr", "conversion_rate")
WINDOW = timedelta(days=1)
SAMPLE_RATIO_ALPHA = 0.01
FRESH_SECONDS, REST = 5.0, 20.0
"""Results are used again for so many seconds, or for so many times as long as the database took."""
MIXED_SHARE = 0.001
"""Share of units in several arms from which on something is wrong; clocks of two servers differ a little."""


class _Told(BaseModel):
    model_config = ConfigDict(frozen=True)


class Rate(_Told):
    """Events per candidate shown; null before there is enough to tell."""

    value: float | None
    low: float | None = None
    high: float | None = None


class ArmResult(_Told):
    """What an arm showed in this stage, and what came of it."""

    name: str
    role: Literal["control", "challenger", "shadow"]
    share: float | None = Field(description="Of the units; none for a shadow arm.")
    paused: str | None = Field(description="Why it serves nobody at present.")
    paused_at: datetime | None
    units: int
    requests: int
    shown: int = Field(description="Candidates.")
    clicks: int = Field(description="Candidates clicked.")
    conversions: int
    ctr: Rate
    conversion_rate: Rate
    off_policy_requests: int = Field(
        description="Answered in random order, which put a candidate where the arm's scores would."
    )
    off_policy_ctr: Rate = Field(description="Of the arm's own ranking, estimated from those requests.")


class Effect(_Told):
    """A challenger's rate minus the control's."""

    arm: str
    metric: OnlineMetric
    value: float
    low: float
    high: float
    p: float
    confidence: float
    verdict: Literal["better", "worse", "noise"]


class GuardrailResult(_Told):
    """Whether a challenger keeps a guardrail: surely, surely not, or not known yet."""

    arm: str
    metric: OnlineMetric
    bound: float
    state: Literal["kept", "broken", "undecided"]
    reason: str


class SampleRatio(_Told):
    """Whether units came to the arms by their shares."""

    expected: dict[str, float]
    observed: dict[str, float]
    p: float = Field(description="Valid at every look.")
    mismatch: bool


class Results(_Told):
    """Results of an experiment's stage."""

    experiment: str
    version: int
    state: str
    primary: OnlineMetric
    interval: Interval
    since: datetime | None = Field(description="When the stage began.")
    until: datetime
    epsilon: float = Field(description="Share of requests answered in random order.")
    arms: list[ArmResult]
    effects: list[Effect]
    guardrails: list[GuardrailResult]
    sample_ratio: SampleRatio | None
    mixed_units: int = Field(description="Units that saw several arms; they count in none.")
    problems: list[str] = Field(description="What makes the figures doubtful, in words.")
    seconds: float = Field(description="That the database took.")

    @property
    def estimated(self) -> bool:
        """Whether requests in random order judge the arms' rankings."""
        return bool(self.epsilon or any(arm.off_policy_requests for arm in self.arms))


def analyse(
    database: Database,
    kept: Experiments,
    name: str,
    *,
    at: datetime | None = None,
    interval: Interval = "sequential",
    window: timedelta = WINDOW,
) -> Results:
    """Return the results of an experiment's present stage.

    Args:
        database: where exposures and events are.
        kept: the experiments, as they were last read.
        name: of the experiment.
        at: results as they stood then, of the stage of then; None: now.
        interval: ``sequential`` holds however often one looks; ``fixed`` for one look at a moment set beforehand.
        window: after an exposure, in which its events count.

    Raises:
        ConfigError: no such experiment.
        Unavailable: the database can't be read now.
    """
    kept.get(name)
    now = at or datetime.now(UTC)
    versions = [one for one in kept.versions(name) if one[1] <= now] or kept.versions(name)[:1]
    version, _, experiment = versions[-1]
    log = kept.pause_log(name)
    since, until = stage(versions, log, now)
    paused = {arm: pause for arm, pause in _latest(log, until).items() if pause.paused}
    online = experiment.online
    assert online is not None
    begin = time.perf_counter()
    found: dict[str, Totals] = {}
    ranking: dict[str, Ranking] = {}
    mixed = 0
    dealt = shares(experiment, since or until)
    if since is not None:
        span = Span.of(name, since=since, until=until, window=window, known=now)
        found, mixed = totals(database, span, list(dealt))
        ranking = ranked(database, span, list(dealt))
        if online.shadow:
            found |= scored(database, span, online.shadow)
        for shadow in online.shadow:  # each by itself: a unit is scored by all of them
            ranking |= ranked(database, span, [shadow])
    with database.reading() as connection:
        pruned = horizon(connection)
    seconds = time.perf_counter() - begin
    live = {arm: found[arm] for arm in dealt if arm in found and arm not in paused}
    alpha, sequential = experiment.decision.alpha, interval == "sequential"
    differences: list[Difference] = []
    for metric in METRICS:
        differences += _differences(live, dealt, experiment.control, metric, alpha, sequential)
    ratio = _sample_ratio(live, {arm: share for arm, share in dealt.items() if arm not in paused})
    return Results(
        experiment=name,
        version=version,
        state=state(experiment, now),
        primary=online.primary,
        interval=interval,
        since=since,
        until=until,
        epsilon=online.epsilon,
        arms=[
            _arm(
                arm.name,
                experiment,
                dealt,
                found.get(arm.name),
                ranking.get(arm.name),
                paused.get(arm.name),
                alpha,
                sequential,
            )
            for arm in experiment.arms
        ],
        effects=[_effect(one) for one in differences],
        guardrails=[
            _guardrail(rail, one) for rail in online.guardrails for one in differences if one.metric == rail.metric
        ],
        sample_ratio=ratio,
        mixed_units=mixed,
        problems=[*_pruned(since, pruned), *_problems(live, ratio, mixed, dealt, paused)],
        seconds=seconds,
    )


def stage(
    versions: list[tuple[int, datetime, Experiment]], log: list[tuple[str, Pause]], now: datetime
) -> tuple[datetime | None, datetime]:
    """Return when the present way to deal units began, None if it has not, and until when it dealt; both in UTC.

    Args:
        versions: of the experiment, with the time of each.
        log: every pause and resumption; what comes after the end changes nothing.
        now: the time.
    """
    experiment = versions[-1][2]
    online = experiment.online
    assert online is not None
    until = now if online.ends is None else min(now, online.ends)
    begun = versions[-1][1]
    for _, created, version in reversed(versions):
        if _dealing(version) != _dealing(experiment):
            break
        begun = created
    if online.starts is not None:
        begun = max(begun, online.starts)
    resumed = [_moment(pause.at) for _, pause in log if not pause.paused]
    begun = max([begun, *(at for at in (*(one.at for one in online.ramp), *resumed) if at < until)])
    return (begun.astimezone(UTC) if begun < until else None), until.astimezone(UTC)


def _dealing(experiment: Experiment) -> dict[str, Any]:
    """What of an experiment decides who sees what, but for shares that change with time."""
    later = {"ramp", "ends", "primary", "guardrails"}
    told = experiment.model_dump(include={"arms", "population", "control", "online"}, exclude={"online": later})
    return told | {"salt": experiment.allocation.salt, "weights": experiment.stages()[0]}


def _latest(log: list[tuple[str, Pause]], now: datetime) -> dict[str, Pause]:
    return {arm: pause for arm, pause in log if _moment(pause.at) <= now}


def _moment(micros: int) -> datetime:
    return datetime.fromtimestamp(micros / 1e6, UTC)


def _sums(one: Totals, metric: str) -> Sums:
    return one.ctr if metric == "ctr" else one.conversion_rate


def _differences(
    live: Mapping[str, Totals],
    dealt: Mapping[str, float],
    control: str,
    metric: OnlineMetric,
    alpha: float,
    sequential: bool,
) -> list[Difference]:
    arms = {arm: _sums(one, metric) for arm, one in live.items() if one.units >= MIN_CLUSTERS}
    if control not in arms:
        return []
    waiting = sum(share > 0 and arm not in arms for arm, share in dealt.items())
    try:
        return compare_rates(
            arms, control=control, metric=metric, alpha=alpha, sequential=sequential, waiting=waiting
        )
    except DataError:  # nothing happened yet in the control
        return []


def _sample_ratio(live: Mapping[str, Totals], dealt: Mapping[str, float]) -> SampleRatio | None:
    units = {arm: live[arm].units if arm in live else 0 for arm in dealt}
    total, whole = sum(units.values()), sum(dealt.values())
    if not total or len(dealt) < 2 or not whole:
        return None
    p = sample_ratio_p(units, dealt)
    return SampleRatio(
        expected={arm: share / whole for arm, share in dealt.items()},
        observed={arm: count / total for arm, count in units.items()},
        p=p,
        mismatch=p < SAMPLE_RATIO_ALPHA,
    )


def _arm(
    name: str,
    experiment: Experiment,
    dealt: Mapping[str, float],
    found: Totals | None,
    ranking: Ranking | None,
    pause: Pause | None,
    alpha: float,
    sequential: bool,
) -> ArmResult:
    one, own = found or Totals(0, 0, 0), ranking or Ranking(0, NOTHING)
    role: Any = "control" if name == experiment.control else "challenger" if name in dealt else "shadow"
    return ArmResult(
        name=name,
        role=role,
        share=dealt.get(name),
        paused=None if pause is None else pause.reason,
        paused_at=None if pause is None else _moment(pause.at),
        units=one.units,
        requests=one.requests,
        shown=one.shown,
        clicks=one.clicks,
        conversions=one.conversions,
        **{metric: _rate(_sums(one, metric), alpha, sequential) for metric in METRICS},
        off_policy_requests=own.requests,
        off_policy_ctr=_rate(own.ctr, alpha, sequential),
    )


def _rate(sums: Sums, alpha: float, sequential: bool) -> Rate:
    if not sums.n:
        return Rate(value=None)
    try:
        low, high = interval_of_rate(sums, alpha=alpha, sequential=sequential)
    except DataError:
        return Rate(value=sums.rate)
    return Rate(value=sums.rate, low=low, high=high)


def _effect(one: Difference) -> Effect:
    told = {name: getattr(one, name) for name in ("metric", "value", "low", "high", "p", "confidence", "verdict")}
    return Effect(arm=one.challenger, **told)


def _guardrail(rail: OnlineGuardrail, one: Difference) -> GuardrailResult:
    verdict: Any = "broken" if one.high < -rail.bound else "kept" if one.low >= -rail.bound else "undecided"
    interval = f"[{one.low:+.4f}, {one.high:+.4f}]"
    reason = f"{rail.metric} {one.value:+.4f} {interval} against the control, bound {rail.bound:g}"
    return GuardrailResult(arm=one.challenger, metric=rail.metric, bound=rail.bound, state=verdict, reason=reason)


def _pruned(since: datetime | None, horizon: int) -> list[str]:
    if since is None or since >= _moment(horizon):
        return []
    return [f"EXPOSURES FROM BEFORE {_moment(horizon):%Y-%m-%d} WERE REMOVED: the figures are of those since"]


def _problems(
    live: Mapping[str, Totals],
    ratio: SampleRatio | None,
    mixed: int,
    dealt: Mapping[str, float],
    paused: Mapping[str, Pause],
) -> list[str]:
    found = []
    if ratio is not None and ratio.mismatch:
        shown = ", ".join(
            f"{arm} {ratio.observed[arm]:.2%} instead of {share:.2%}" for arm, share in ratio.expected.items()
        )
        found.append(
            f"SAMPLE RATIO MISMATCH (p = {ratio.p:.2g}): {shown}. Something keeps units from an arm: "
            "no difference between the arms is to be trusted"
        )
    units = mixed + sum(one.units for one in live.values())
    if units and mixed / units > MIXED_SHARE:
        found.append(
            f"UNITS IN SEVERAL ARMS: {mixed:,} of {units:,}, which count in none. "
            "Servers deal by different versions, or by different clocks"
        )
    missing = [arm for arm, share in dealt.items() if share and arm not in live and arm not in paused]
    if units and missing:
        found.append(
            f"nobody was served by {', '.join(missing)}: is its bundle loaded, with the gates that it names?"
        )
    return found


class LiveResults:
    """Results for whoever asks, computed one at a time, and kept for a while: the longer, the more they cost.

    What is older than that is given out once more while it is computed anew; its ``until`` says of when it is.
    After a pause or another version it is not: who asks then waits.

    Args:
        database: of its own, for long queries.
        kept: the experiments.
    """

    def __init__(self, database: Database, kept: Experiments) -> None:
        self.database, self.kept = database, kept
        self._lock = asyncio.Lock()
        self._cached: dict[str, tuple[float, object, Results]] = {}
        self._renewing: dict[str, asyncio.Task[Results]] = {}

    async def get(self, name: str, *, interval: Interval = "sequential", at: datetime | None = None) -> Results:
        """Return the results of an experiment.

        Raises:
            ConfigError: no such experiment.
            Unavailable: the database can't be read now.
        """
        if at is not None or interval != "sequential":
            async with self._lock:
                work = partial(analyse, self.database, self.kept, name, at=at, interval=interval)
                return await asyncio.to_thread(work)
        until, known, results = self._cached.get(name, (0.0, None, None))
        same = results is not None and known == self._mark(name)
        if same and time.monotonic() < until:
            assert results is not None
            return results
        task = self._renewing.get(name)
        if task is None or task.done():
            task = self._renewing[name] = asyncio.create_task(self._renew(name))
        if same and results is not None and results.seconds > FRESH_SECONDS:
            task.add_done_callback(_look)
            return results
        return await asyncio.shield(task)

    async def _renew(self, name: str) -> Results:
        async with self._lock:
            mark = self._mark(name)
            results = await asyncio.to_thread(analyse, self.database, self.kept, name)
            until = time.monotonic() + max(FRESH_SECONDS, REST * results.seconds)
            self._cached[name] = until, mark, results
            return results

    def _mark(self, name: str) -> object:
        return self.kept.get(name), self.kept.paused(name)

    def close(self) -> None:
        """Let go of the connections."""
        self.database.close()


def _look(task: asyncio.Task[Results]) -> None:
    """Look at what went wrong, or asyncio complains that nobody did; who asks next hears of it."""
    if not task.cancelled():
        task.exception()
