"""From a parsed request to its answer: who answers, what is stored, the scores, and the exposure that it leaves."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from ctr_models.errors import RequestError
from serving.batching import Batcher, Encoded, Late, Overloaded
from serving.models import Models
from serving.monitoring import Metrics
from serving.online_features import Found, OnlineFeatures, ids_of
from serving.schemas import ModelCard, Question, Refused, StoredFeatures, overloaded, refused_value
from serving.scorer import Scorer
from serving.stages import Stages
from serving.traffic import Decision, Given, Traffic


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
        """Return it as JSON shows it."""
        content = {"scores": self.scores.tolist(), "model": self.model.model_dump(), "request_id": self.request_id}
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
    ) -> Answer:
        """Score a request.

        Args:
            asked: as it was parsed.
            slot: that it names; None: the default.
            request_id: under which it is answered.
            deadline: by ``time.perf_counter()``; after it nothing is computed.
            stages: of the request, to which those of the answer are added.

        Raises:
            Refused: with the status and the problems.
        """
        stages, begin = stages or Stages(), time.perf_counter()
        decision = Decision(slot) if self.traffic is None else self.traffic.decide(asked.user, asked.context, slot)
        scorer = self.models.scorer(decision.slot)
        stages.end("decode")
        try:
            encoded, given, stored = await self._encoded(scorer, asked, stages)
            scores = await self.batcher.score(scorer, encoded, deadline, stages)
        except RequestError as error:
            raise refused_value(error, scorer.columns) from None
        except Overloaded as error:
            raise overloaded(error.seconds) from None
        except Late:
            message = "the deadline passed before the request's turn came; nothing was computed"
            raise Refused.of(504, ("header", "X-Deadline-Ms"), message, "deadline_passed") from None
        self.metrics.candidates.inc(len(scores))
        said: dict[str, Any] = {}
        if self.traffic is not None:
            said = await self.traffic.expose(decision, given, scores, scorer, request_id)
            stages.end("exposure")
            self.metrics.served(decision.assignments, time.perf_counter() - begin)
        self.metrics.drift.saw(decision.slot or self.models.default.name, scorer, encoded, scores)
        return Answer(scores, scorer.card, request_id, said, stored)

    async def _encoded(
        self, scorer: Scorer, asked: Question, stages: Stages
    ) -> tuple[Encoded, Given, StoredFeatures | None]:
        """Encode a request, completed from the online feature store; tell what was encoded, and what missed."""
        given: Given = asked.user, asked.context, asked.candidates
        if self.features is None:
            encoded = scorer.encode(*given)
            stages.end("encode")
            return encoded, given, None
        spec = scorer.bundle.state.spec
        ids = ids_of(spec, *given)
        found = await self.features.fetch(*ids)
        stages.end("fetch")
        try:
            filled = found.fill(spec, *given)
            encoded, given = scorer.encode(*filled), filled
        except RequestError:
            encoded = scorer.encode(*given)  # raises if it is the request's fault
            self.metrics.errors.labels("stored_features").inc()
            found = Found.nothing(ids[1])
        stored = found.report(*ids)
        self.metrics.looked_up(stored)
        stages.end("encode")
        return encoded, given, stored
