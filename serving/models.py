"""Which bundle answers: named slots, each watched and swapped for a new bundle without a request lost."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from ctr_models.errors import ArtifactError, SluiceError, nearest
from pipelines.release.bundle import MANIFEST
from pipelines.release.registry import SCHEME, locate
from serving.schemas import ModelCard, Refused
from serving.scorer import Scorer
from serving.settings import Settings

T = TypeVar("T")

log = logging.getLogger("sluice.models")

LONGEST_PAUSE = 300.0
"""Seconds between two tries of a bundle that was refused, at most."""


@dataclass
class Slot:
    """A name for whatever bundle answers under it.

    Args:
        name: as requests say it.
        source: ``models:/name@alias``, ``models:/name/version`` or a path.
        scorer: that answers; None before the first is loaded.
        problem: why the source's newest bundle does not answer; empty if it does.
    """

    name: str
    source: str
    scorer: Scorer | None = None
    problem: str = ""
    seen: object = None
    refused: object = None
    refusal: str = ""
    failures: int = 0
    again: float = field(default=0.0, repr=False)


class Models:
    """The slots of a server.

    A new bundle is loaded, verified by its golden rows and warmed up beside the old one, on a thread; then the
    slot names the new one. Requests that hold the old Scorer end with it: whoever takes a Scorer scores with it and
    answers with its card. A bundle that does not prove itself is refused, and the old one stays.

    Args:
        settings: of the deployment.
        on_swap: called with slot and card once a bundle answers.
        on_refusal: called with slot and reason when a bundle is refused.

    Attributes:
        slots: by their names.
        default: the slot that answers requests which name none.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        on_swap: Callable[[str, ModelCard], None] = lambda *_: None,
        on_refusal: Callable[[str, str], None] = lambda *_: None,
    ) -> None:
        self.slots = {name: Slot(name, source) for name, source in settings.slots.items()}
        self.default = next(iter(self.slots.values()))
        self._settings, self._on_swap, self._on_refusal = settings, on_swap, on_refusal
        # One at a time, and on one core: the others go on serving.
        self._thread = ThreadPoolExecutor(
            1, thread_name_prefix="load", initializer=torch.set_num_threads, initargs=(1,)
        )

    @property
    def ready(self) -> bool:
        """Whether every slot has a bundle."""
        return all(slot.scorer is not None for slot in self.slots.values())

    def scorer(self, name: str | None = None) -> Scorer:
        """Return what answers in a slot now.

        Args:
            name: of the slot; None is the default.

        Raises:
            Refused: 404, no such slot; 503, it is not loaded yet.
        """
        slot = self.default if name is None else self.slots.get(name)
        if slot is None:
            raise Refused.of(404, ("model",), f"no such model; {nearest(name or '', self.slots)}", "unknown_model")
        if slot.scorer is None:
            raise Refused.of(
                503, (), slot.problem or "the model is being loaded", "not_ready", headers={"Retry-After": "1"}
            )
        return slot.scorer

    def status(self) -> list[dict[str, Any]]:
        """Return what can be said of each slot: what answers, and why the newest bundle does not if so."""
        found = []
        for slot in self.slots.values():
            told: dict[str, Any] = {"slot": slot.name, "source": slot.source}
            if slot.scorer is not None:
                told["model"] = slot.scorer.card.model_dump()
                told["forward"] = slot.scorer.forward.told()
            if slot.problem:
                told["problem"] = slot.problem
            found.append(told)
        return found

    async def load(self) -> None:
        """Load every slot's bundle.

        Raises:
            ArtifactError: one can't be found, or does not prove itself.
        """
        for slot in self.slots.values():
            try:
                slot.seen = await self._aside(self._look, slot)
                scorer = await self._aside(self._scorer_of, slot.source)
            except Exception as error:
                self._refuse(slot, error)
                raise
            self._swap(slot, scorer)

    async def watch(self) -> None:
        """Look for new bundles until cancelled."""
        if not self._settings.poll_seconds:
            return
        while True:
            await asyncio.sleep(self._settings.poll_seconds)
            await self.refresh()

    async def refresh(self) -> None:
        """Look once at every slot, and swap where there is a new bundle."""
        for slot in self.slots.values():
            await self._refresh(slot)

    def close(self) -> None:
        """Wait for what is being loaded, and load no more."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    async def _aside(self, work: Callable[..., T], *given: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *given)

    async def _refresh(self, slot: Slot) -> None:
        try:
            found = await self._aside(self._look, slot)
        except Exception as error:
            # A store that can't be reached says nothing of the bundle that answers; it is told, and asked again.
            self._tell(slot, error)
            return
        if found == slot.seen:
            slot.problem, slot.refused, slot.failures = "", None, 0
            return
        if found == slot.refused and time.monotonic() < slot.again:
            slot.problem = slot.refusal  # a store that could not be reached may have been told of meanwhile
            return
        try:
            scorer = await self._aside(self._scorer_of, slot.source)
        except Exception as error:
            slot.failures = slot.failures + 1 if found == slot.refused else 1
            slot.refused = found
            pause = self._settings.poll_seconds * 2.0 ** min(slot.failures, 60)  # a float has no 2**1024
            slot.again = time.monotonic() + min(LONGEST_PAUSE, pause)
            self._refuse(slot, error)
            return
        slot.seen = found
        self._swap(slot, scorer)

    def _scorer_of(self, source: str) -> Scorer:
        return Scorer.load(source, self._settings.tracking_uri, int8=self._settings.int8)

    def _look(self, slot: Slot) -> object:
        """Return what changes whenever the source means another bundle."""
        if slot.source.startswith(SCHEME):
            release = locate(slot.source, self._settings.tracking_uri)
            return release.version, release.bundle_hash
        try:
            stat = (Path(slot.source) / MANIFEST).stat()
        except OSError as error:
            if slot.scorer is None:
                return None  # loading says what is wrong
            raise ArtifactError(f"no bundle here any more ({error.strerror})", where=slot.source) from None
        return stat.st_ino, stat.st_mtime_ns, stat.st_size

    def _swap(self, slot: Slot, scorer: Scorer) -> None:
        old, slot.scorer = slot.scorer, scorer
        slot.problem, slot.refused, slot.failures = "", None, 0
        was = f", was {_shown(old.card)}" if old is not None else ""
        log.info("slot %s: %s answers%s", slot.name, _shown(scorer.card), was)
        self._on_swap(slot.name, scorer.card)

    def _refuse(self, slot: Slot, error: Exception) -> None:
        self._tell(slot, error)
        slot.refusal = slot.problem
        self._on_refusal(slot.name, slot.problem)

    def _tell(self, slot: Slot, error: Exception) -> None:
        known = isinstance(error, SluiceError)
        problem = str(error) if known else "the model could not be loaded; see the server's log"
        if problem != slot.problem or not known:
            log.error("slot %s: %s", slot.name, problem, exc_info=None if known else error)
        slot.problem = problem


def _shown(card: ModelCard) -> str:
    version = "" if card.version is None else f" version {card.version}"
    return f"{card.name}{version} ({card.hash[:12]})"
