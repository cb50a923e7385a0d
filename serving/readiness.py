"""What ``/readyz`` tells: whether the server can score, and every part of it that is not as it should be."""

from __future__ import annotations

from typing import Any

from serving.drain import Drain
from serving.models import Models
from serving.online_features import OnlineFeatures, status_for
from serving.traffic import Traffic


def readiness(
    models: Models, features: OnlineFeatures | None, traffic: Traffic | None, drain: Drain
) -> tuple[int, dict[str, Any]]:
    """Return the status and the content of the answer.

    A server that can score is ready, though parts be degraded: it answers without them, and they come back.

    Args:
        models: of the server.
        features: its online feature store, if it has one.
        traffic: its experiments and events, if they are kept.
        drain: whether it is stopping.
    """
    told = models.status()
    content: dict[str, Any] = {"status": "ready", "models": told}
    degraded = [_part(f"models.{slot['slot']}", slot["problem"]) for slot in told if "problem" in slot]
    if drain.begun:
        reason = f"the server is stopping; {drain.in_hand - 1} requests are being finished"
        return 503, {**content, "status": "draining", "reason": reason}
    if not models.ready:
        reason = degraded[0]["reason"] if degraded else "the model is being loaded"
        return 503, {**content, "status": "not ready", "reason": reason}
    content["model"] = models.scorer().card.model_dump()
    if features is not None:
        scorers = {name: slot.scorer for name, slot in models.slots.items() if slot.scorer is not None}
        status = status_for(features, {n: s.bundle.state.spec for n, s in scorers.items()})
        content["features"] = status
        if "problem" in status:
            degraded.append(_part("features", status["problem"]))
        for slot, names in status.get("lacks", {}).items():
            degraded.append(_part("features", f"the store lacks {', '.join(names)}, which slot {slot} reads"))
    if traffic is not None:
        events = traffic.store.status
        content["events"] = vars(events)
        if events.state != "ready":
            degraded.append(_part("events", events.reason))
        if events.refused:
            degraded.append(_part("events", f"{events.refused} rows were refused by the database and are kept"))
        if traffic.problem:
            degraded.append(_part("experiments", traffic.problem))
    return 200, {**content, "degraded": degraded}


def _part(name: str, reason: str) -> dict[str, str]:
    return {"part": name, "reason": reason}
