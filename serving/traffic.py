"""Live traffic: who answers a request by the experiments that it is in, and the exposure that it leaves."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from ctr_models.errors import ConfigError
from pipelines.experiments.experiment import Arm
from pipelines.features.overlay import overlaid
from serving.analysis import LiveResults
from serving.batching import Batcher, Late, Overloaded
from serving.database import Database, Row, Unavailable
from serving.events import EventStore, NotStored, assigned, exposure, items_of
from serving.experiments import Experiments
from serving.guardrails import Guardrails
from serving.kept import Kept
from serving.models import Models
from serving.off_policy import matched
from serving.router import Assignment, drawn, order
from serving.schemas import Refused
from serving.scorer import Scorer
from serving.settings import Settings

log = logging.getLogger("sluice.experiments")
Columns = Mapping[str, Any]
Given = tuple[Columns, Columns, Sequence[Columns]]
"""User, context and candidates, as they are scored."""


@dataclass(frozen=True)
class Decision:
    """What the experiments say of one request.

    Args:
        slot: whose model answers; None: the default.
        assignments: the experiments that the request is in.
        asked: whose model would answer without them.
    """

    slot: str | None
    assignments: tuple[Assignment, ...] = ()
    asked: str | None = None


class Traffic:
    """The event store and the experiments of a server.

    Args:
        settings: with ``events_url``.
        models: whose slots the arms name.
        batcher: that shadow arms compute in.

    Attributes:
        problem: why the experiments may not be the latest; empty if they are.

    Raises:
        ConfigError: the URL names no database for events, or the spool's folder can't be written.
    """

    def __init__(self, settings: Settings, models: Models, batcher: Batcher) -> None:
        assert settings.events_url is not None
        self._settings, self._models, self._batcher = settings, models, batcher
        # Connections are not shared between the writer's thread and the readers of experiments.
        self._database = Database(settings.events_url)
        self.experiments = Experiments(self._database)
        self.store = _store(settings, Database(settings.events_url))
        self.results = LiveResults(Database(settings.events_url), self.experiments)
        self._guardrails = Guardrails(Database(settings.events_url), self.experiments, settings.guardrail_seconds)
        self.kept = Kept(self._database)
        self._shadows: set[asyncio.Task[None]] = set()
        self._told: set[str] = set()
        self.problem = ""

    async def watch(self) -> None:
        """Follow the experiments that other processes store, check their guardrails, and look at what is kept."""
        await asyncio.gather(self._follow(), self._guardrails.watch(), self.kept.watch())

    async def _follow(self) -> None:
        created = False
        while True:
            try:
                if not created:
                    await asyncio.to_thread(self._database.create)
                    created = True
                await asyncio.to_thread(self.experiments.refresh)
                self._told.discard("away")
                self.problem = ""
            except Unavailable as error:
                self.problem = f"experiments can't be read, the last known stay in force: {error}"
                self._tell("away", self.problem)
            await asyncio.sleep(self._settings.experiments_seconds)

    def slot_of(self, arm: Arm) -> str | None:
        """Return the slot that serves an arm's bundle; None if no slot does, or its gates are others."""
        slots = self._models.slots
        names = [arm.bundle] if arm.bundle in slots else [n for n, s in slots.items() if s.source == arm.bundle]
        for name in names:
            scorer = slots[name].scorer
            if scorer is None:
                continue
            hashes = {slot: gate.rpartition(":")[2] for slot, gate in scorer.card.gates.items()}
            if arm.gate_hashes.items() <= hashes.items():
                return name
        return None

    def decide(self, user: Columns, context: Columns, slot: str | None) -> Decision:
        """Deal a request.

        An arm that can't be served now leaves its experiment out of the request: nobody is counted in an arm that
        he did not see.

        Args:
            user, context: columns of the request.
            slot: that it asks for; None: the default.
        """
        columns, model = overlaid(user, context), slot or self._models.default.name
        assignments, chosen = [], None
        for assignment in self.experiments.router.assign(columns, at=datetime.now(UTC), model=model):
            arm = assignment.arm
            if arm.bundle is not None:
                found = self.slot_of(arm)
                if found is None or chosen not in (None, found):
                    self._tell(arm.bundle, f"{assignment.experiment}, arm {arm.name}: {arm.bundle} can't be served")
                    continue
                chosen = found
            if assignment.counted:
                assignments.append(assignment)
        return Decision(chosen or slot, tuple(assignments), asked=slot)

    async def expose(
        self, decision: Decision, given: Given, scores: np.ndarray, scorer: Scorer, request_id: str
    ) -> dict[str, Any]:
        """Leave the exposure of a request, and let the shadow arms score it.

        Args:
            decision: by which it was answered.
            given: as it was scored.
            scores: (N,).
            scorer: that scored.
            request_id: of the request.

        Returns:
            what the answer says of it: the arm in each experiment, and where positions are drawn, the positions.

        Raises:
            Refused: 503, the exposure can't be stored.
        """
        epsilon = max((a.epsilon for a in decision.assignments), default=0.0)
        positions, propensities = order(scores, epsilon=epsilon, seed=request_id)
        random = positions if drawn(epsilon, request_id) else None
        shown = positions, propensities
        rows = _rows(request_id, given, scores, scorer, decision.assignments, shown=shown, random=random)
        stored = self.store.submit(rows)
        if self._settings.exposures == "before" or stored.done():
            try:
                await asyncio.wrap_future(stored)
            except NotStored as error:
                raise not_stored(error) from None
        for assignment in decision.assignments:
            for arm in assignment.shadows:
                slot = decision.asked if arm.bundle is None else self.slot_of(arm)
                if arm.bundle is not None and slot is None:
                    self._tell(arm.bundle, f"{assignment.experiment}, shadow arm {arm.name}: can't be scored")
                    continue
                scorer = self._models.scorer(slot)
                task = asyncio.create_task(self._shadow(assignment, arm, scorer, given, request_id, random))
                self._shadows.add(task)
                task.add_done_callback(self._shadows.discard)
        if not decision.assignments:
            return {}
        said: dict[str, Any] = {"experiments": {a.experiment: a.arm.name for a in decision.assignments}}
        return said | ({"positions": positions.tolist()} if epsilon else {})

    async def _shadow(
        self,
        assignment: Assignment,
        arm: Arm,
        scorer: Scorer,
        given: Given,
        request_id: str,
        random: np.ndarray | None,
    ) -> None:
        try:
            scores = await self._batcher.score(scorer, scorer.encode(*given))
            shadow = assignment.experiment, arm.name
            rows = _rows(request_id, given, scores, scorer, (assignment,), random=random, shadow=shadow)
            await self.store.record(rows)
        except (Overloaded, Late):
            pass  # who is served goes first
        except Exception as error:  # whatever it is, nobody waits for it who could be told
            self._tell(arm.name, f"{assignment.experiment}, shadow arm {arm.name}: {error}")

    async def close(self) -> None:
        """Let the shadow arms end, write what was taken, and stop."""
        await asyncio.gather(*self._shadows, return_exceptions=True)
        await asyncio.to_thread(self.store.close)
        self._database.close()
        self._guardrails.close()
        self.results.close()

    def _tell(self, what: str, message: str) -> None:
        if what not in self._told:
            self._told.add(what)
            log.error(message)


def _rows(
    request_id: str,
    given: Given,
    scores: np.ndarray,
    scorer: Scorer,
    assignments: Sequence[Assignment],
    *,
    shown: tuple[np.ndarray, np.ndarray] | None = None,
    random: np.ndarray | None,
    shadow: tuple[str, str] | None = None,
) -> list[Row]:
    """Return all that a scored request leaves.

    Args:
        request_id, given, scores, assignments, shadow: as for :func:`serving.events.exposure`.
        scorer: that scored.
        shown: positions and propensities, (N,); None: by falling score.
        random: the positions of the request, (N,), if they were drawn; a shadow arm is given them too.
    """
    spec = scorer.bundle.state.spec
    positions, propensities = shown or (None, None)
    row = exposure(
        request_id=request_id,
        given=given,
        scores=scores,
        card=scorer.card,
        schema_hash=scorer.bundle.state.hash,
        unit=spec.user,
        item=spec.item,
        assignments=assignments,
        shadow=shadow,
        positions=positions,
        propensities=propensities,
    )
    about = assigned(row, assignments, len(scores), shadow=shadow)
    if random is None:
        return [row, *about]
    items = items_of(given, spec.item) or [None] * len(scores)
    return [row, *about, *matched(about, scores, random, items)]


def _store(settings: Settings, database: Database) -> EventStore:
    try:
        return EventStore(database, settings.events_spool, spool_bytes=settings.events_spool_bytes)
    except OSError as error:
        raise ConfigError(
            f"exposures and events can't be kept here ({error.strerror})",
            where=str(Path(error.filename or settings.events_spool).absolute()),
            remedy="give SLUICE_EVENTS_SPOOL a folder and --events a database that can be written; "
            "--events none keeps nothing",
        ) from None


def not_stored(error: NotStored) -> Refused:
    """Return the answer to a request whose rows can't be kept."""
    return Refused.of(503, (), f"nothing was stored: {error}", "not_stored", headers={"Retry-After": "1"})
