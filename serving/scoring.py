"""From a parsed request to its answer: who answers, what is stored, the scores, and the exposure that it leaves."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from starlette.requests import ClientDisconnect

from ctr_models.errors import RequestError
from pipelines.features.candidate_columns import CandidateColumns
from pipelines.features.overlay import overlaid
from serving.aside import aside
from serving.batching import Batcher, Encoded, Gone, Late, Overloaded
from serving.line import Line
from serving.models import Models
from serving.monitoring import Metrics
from serving.online_features import Found, OnlineFeatures, ids_of
from serving.schemas import ModelCard, Question, Refused, StoredFeatures, overloaded, refused_value
from serving.scorer import Scorer
from serving.stages import Stages
from serving.traffic import Decision, Given, Traffic

error_log = logging.getLogger("sluice.error")


@dataclass(frozen=True)
class Answer:
    """What is told of a scored request; :class:`serving.schemas.ScoreResponse` describes it.

    Args:
        scores: (N,) float32, in the order of the candidates.
        model: that answered.
        request_id: of the request.
        said: by the experiments: ``experiments`` and ``positions``, or nothing.
        stored: what the online feature store gave; None without one.
    """

    scores: np.ndarray
    model: ModelCard
    request_id: str
    said: dict[str, Any]
    stored: StoredFeatures | None

    def content(self) -> dict[str, Any]:
        """Return it as JSON shows it, for msgspec to encode."""
        content = {"scores": self.scores.tolist(), "model": self.model.shown, "request_id": self.request_id}
        content |= self.said
        return content if self.stored is None else content | {"features": self.stored.model_dump()}


class Scoring:
    """Answers requests; routes read and write them.

    Args:
        models: what answers.
        batcher: where it computes.
        metrics: of the application.
        features: the online feature store, if there is one.
        traffic: experiments and exposures, if they are kept.
    """

    def __init__(
        self,
        models: Models,
        batcher: Batcher,
        metrics: Metrics,
        features: OnlineFeatures | None,
        traffic: Traffic | None,
    ) -> None:
        self.models, self.batcher, self.metrics = models, batcher, metrics
        self.features, self.traffic = features, traffic

    async def answer(
        self,
        asked: Question,
        *,
        slot: str | None,
        request_id: str,
        deadline: float = math.inf,
        stages: Stages | None = None,
        scorer: Scorer | None = None,
        line: Line | None = None,
        size: int = 0,
    ) -> Answer:
        """Score a request.

        Args:
            asked: as it was parsed.
            slot: that answers if it names none; None: the default.
            request_id: under which it is answered.
            deadline: by ``time.perf_counter()``; after it nothing is computed.
            stages: of the request, to which those of the answer are added.
            scorer: of the slot, that shall answer whatever comes meanwhile; the request is then in no experiment.
            line: to the client; once it is lost nothing is computed, and no exposure is left.
            size: bytes of its body, for :func:`serving.aside.aside`.

        Raises:
            Refused: with the status and the problems.
            ClientDisconnect: the line is lost.
        """
        stages, begin = stages or Stages(), time.perf_counter()
        slot = asked.model or slot
        stages.end("decode")
        first = scorer or self.models.scorer(slot)
        found = await self._found(first, asked, stages)
        decision = self._decision(asked, found, slot) if scorer is None else Decision(slot)
        scorer = scorer or self.models.scorer(decision.slot)
        if not _same_ids(scorer, first):
            found = await self._found(scorer, asked, stages)
        try:
            encoded, given, used = await aside(size, _encoded, scorer, asked, found)
        except RequestError as error:
            raise refused_value(error, scorer.columns) from None
        stored = None if found is None else self._reported(scorer, asked, used)
        stages.end("encode")
        scores = await self.score(decision.slot, scorer, encoded, deadline, stages, line)
        said: dict[str, Any] = {}
        if self.traffic is not None:
            if isinstance(given[2], CandidateColumns):
                given = given[0], given[1], list(given[2])
            said = await self.traffic.expose(decision, given, scores, scorer, request_id)
            stages.end("exposure")
            self.metrics.served(decision.assignments, time.perf_counter() - begin)
        return Answer(scores, scorer.card, request_id, said, stored)

    async def score(
        self,
        slot: str | None,
        scorer: Scorer,
        encoded: Encoded,
        deadline: float = math.inf,
        stages: Stages | None = None,
        line: Line | None = None,
    ) -> np.ndarray:
        """Score what is encoded, and count it.

        Args:
            slot: that answers; None: the default.
            scorer: that encoded it.
            encoded: N candidates.
            deadline: as in :meth:`answer`.
            stages: likewise.
            line: likewise.

        Returns:
            (N,) float32.

        Raises:
            Refused: 503, too much waits already; 504, the deadline passed; 422, a score is no number.
            ClientDisconnect: the line was lost, before the pass or by its end.
        """
        try:
            scores = await self.batcher.score(scorer, encoded, deadline, stages, line)
            if line is not None and line.lost:
                raise Gone
        except Gone:
            self.metrics.errors.labels("gone").inc()
            raise ClientDisconnect from None
        except Overloaded as error:
            raise overloaded(error.seconds) from None
        except Late:
            message = "the deadline passed before the request's turn came; nothing was computed"
            raise Refused.of(504, ("header", "X-Deadline-Ms"), message, "deadline_passed") from None
        if not np.isfinite(scores).all():
            raise Refused.of(422, ("body",), "a score is no number: some value is too extreme", "score_not_finite")
        self.metrics.candidates.inc((), len(scores))
        name = slot or self.models.default.name
        if self.models.slots[name].scorer is scorer:  # what came before a swap does not count for what came after
            self.metrics.drift.saw(name, scorer, encoded, scores)
        return scores

    async def answer_all(
        self,
        asked: Sequence[Question | Refused],
        *,
        slot: str | None,
        request_ids: Sequence[str],
        deadline: float = math.inf,
        stages: Stages | None = None,
        line: Line | None = None,
        size: int = 0,
    ) -> list[Answer | Refused]:
        """Score many requests at once; they share forward passes as concurrent ones do.

        Args:
            asked: as they were parsed; what was refused then stays so.
            slot: of those that name none.
            request_ids: one each.
            deadline: of all.
            stages: of them together, to which those of each are added.
            line: as in :meth:`answer`.
            size: bytes of their body, of which each counts as an equal part.

        Raises:
            ClientDisconnect: the line is lost.
        """
        together = stages or Stages()

        async def one(question: Question | Refused, request_id: str) -> Answer | Refused:
            try:
                if isinstance(question, Refused):
                    raise question
                return await self.answer(
                    question,
                    slot=slot,
                    request_id=request_id,
                    deadline=deadline,
                    stages=together.part(),
                    line=line,
                    size=size // len(asked),
                )
            except ClientDisconnect:
                raise
            except Exception as error:
                refused = error if isinstance(error, Refused) else _internal(request_id)
                self.metrics.errors.labels(refused.problems[0].type).inc()
                return refused

        return await asyncio.gather(*map(one, asked, request_ids))

    async def _found(self, scorer: Scorer, asked: Question, stages: Stages) -> Found | None:
        """Look up what is stored of a request's user and candidates."""
        if self.features is None:
            return None
        spec = scorer.bundle.state.spec
        found = await self.features.fetch(spec, *ids_of(spec, asked.user, asked.context, asked.candidates))
        stages.end("fetch")
        return found

    def _decision(self, asked: Question, found: Found | None, slot: str | None) -> Decision:
        """Deal a request by all that is known of its user, stored or given."""
        if self.traffic is None:
            return Decision(slot)
        stored = found.user if found is not None else None
        return self.traffic.decide(overlaid(stored, asked.user) if stored else asked.user, asked.context, slot)

    def _reported(self, scorer: Scorer, asked: Question, used: Found | None) -> StoredFeatures:
        """Tell what was stored, and count what was not; None: what was stored could not be encoded."""
        ids = ids_of(scorer.bundle.state.spec, asked.user, asked.context, asked.candidates)
        if used is None:
            self.metrics.errors.labels("stored_features").inc()
            used = Found.nothing(ids[1])
        stored = used.report(*ids)
        self.metrics.looked_up(stored)
        return stored


def _encoded(scorer: Scorer, asked: Question, found: Found | None) -> tuple[Encoded, Given, Found | None]:
    """Encode a request, completed by what is stored; tell what was encoded, and what of the store was used."""
    given: Given = asked.user, asked.context, asked.candidates
    if found is not None:
        try:
            filled = found.fill(scorer.bundle.state.spec, *given)
            return scorer.encode(*filled), filled, found
        except RequestError:
            pass  # raised again below if it is the request's fault
    return scorer.encode(*given), given, None


def _internal(request_id: str) -> Refused:
    """Log the error at hand under its request, of which no more is told outward."""
    error_log.exception("a request of a batch failed", extra={"fields": {"request_id": request_id}})
    return Refused.of(500, (), "internal error", "internal")


def _same_ids(one: Scorer, other: Scorer) -> bool:
    """Say whether two models name users and items by the same columns."""
    if one is other:
        return True
    spec, others = one.bundle.state.spec, other.bundle.state.spec
    return (spec.user, spec.item) == (others.user, others.item)
