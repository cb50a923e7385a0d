"""Guardrails that act: an arm that surely harms a metric beyond its bound is paused, until somebody resumes it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from serving.analysis import REST, analyse
from serving.database import Database, Unavailable
from serving.experiments import Experiments, state

log = logging.getLogger("sluice.experiments")


@dataclass(frozen=True)
class Breach:
    """An arm that was paused, and why."""

    experiment: str
    arm: str
    reason: str


def check(database: Database, kept: Experiments) -> tuple[list[Breach], float]:
    """Look at the guardrails of all running experiments, and pause the arms that surely broke one.

    "Surely" means that the whole sequential interval of the difference lies beyond the bound. It holds at all looks
    together, so that looking often makes no false alarms.

    Args:
        database: where exposures and events are.
        kept: the experiments.

    Returns:
        the arms that were paused, and the seconds that the database took.

    Raises:
        Unavailable: the database can't be read or written now.
    """
    kept.refresh()
    found, seconds = [], 0.0
    for told in kept.list():
        name = told["experiment"]["name"]
        online = kept.get(name).online
        if online is None or not online.guardrails or state(kept.get(name), datetime.now(UTC)) != "running":
            continue
        results = analyse(database, kept, name)
        seconds += results.seconds
        broken = {one.arm: one for one in reversed(results.guardrails) if one.state == "broken"}
        for arm, guardrail in broken.items():
            reason = f"guardrail: {guardrail.reason}"
            if kept.pause(name, arm, reason).reason == reason:
                found.append(Breach(name, arm, reason))
    return found, seconds


class Guardrails:
    """Checks now and then, in one of the processes that share a database.

    Args:
        database: of its own, for long queries.
        kept: the experiments.
        seconds: between two checks; 0 makes none. What takes long is done more seldom.
    """

    def __init__(self, database: Database, kept: Experiments, seconds: float) -> None:
        self._database, self._kept, self._seconds = database, kept, seconds

    async def watch(self) -> None:
        """Check until cancelled."""
        wait = self._seconds
        while self._seconds:
            await asyncio.sleep(wait)
            try:
                if await asyncio.to_thread(self._database.claim, "guardrails", 0.9 * wait):
                    _, took = await asyncio.to_thread(check, self._database, self._kept)
                    wait = max(self._seconds, REST * took)
            except Unavailable as error:
                log.error("guardrails can't be checked: %s", error)
            except Exception:
                log.exception("guardrails can't be checked")

    def close(self) -> None:
        """Let go of the connections."""
        self._database.close()


class PausedArms(Collector):
    """``sluice_arm_paused``, as the process knows it when it is asked."""

    def __init__(self, kept: Experiments) -> None:
        self._kept = kept

    def collect(self) -> Iterable[Metric]:
        """Yield 1 for an arm that is paused, 0 for one that was and is resumed."""
        family = GaugeMetricFamily("sluice_arm_paused", "Arms that serve nobody.", labels=["experiment", "arm"])
        for told in self._kept.list():
            name = told["experiment"]["name"]
            for arm, pause in self._kept.paused(name).items():
                family.add_metric([name, arm], float(pause.paused))
        yield family
