"""Stored features from a snapshot in a folder, mapped into memory: the store of one machine."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ctr_models.errors import ArtifactError
from pipelines.features.snapshot import MANIFEST, Snapshot
from pipelines.features.spec import FeatureSpec
from pipelines.features.stored import Stored
from serving.online_features import LOOK_SECONDS, Found, status_of, stored_ids

log = logging.getLogger("sluice.features")

REFUSED_SECONDS = 30.0
"""After which a refused snapshot is tried again, though it looks the same: it may have been half copied."""


class SnapshotFeatures:
    """A snapshot in a folder. One that takes its place is opened, checked, then used; a damaged one is refused.

    Args:
        folder: where ``sluice materialize`` writes it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._snapshot: Snapshot | None = None
        self._problem = "the features are being opened"
        self._seen: object = None
        self._again = 0.0

    @property
    def stored(self) -> Stored | None:
        return self._snapshot.stored if self._snapshot is not None else None

    async def fetch(self, spec: FeatureSpec, user_id: Any, item_ids: Sequence[Any]) -> Found:
        snapshot = self._snapshot
        if snapshot is None:
            return Found.nothing(item_ids)
        user, items = stored_ids(snapshot.stored, spec, user_id, item_ids)
        (found,) = snapshot.find("users", [user]) if user is not None else [None]
        rows = iter(snapshot.find("items", [one for one in items if one is not None]))
        return Found(found, [next(rows) if one is not None else None for one in items], snapshot.version)

    async def refresh(self) -> None:
        seen = self._look()
        if seen == self._seen and (not self._problem or time.monotonic() < self._again):
            return
        self._seen, self._again = seen, time.monotonic() + REFUSED_SECONDS
        try:
            self._snapshot = await asyncio.to_thread(Snapshot.open, self.folder)
        except ArtifactError as error:
            if str(error) != self._problem:
                kept = " The one before stays in use." if self._snapshot is not None else ""
                log.error("features: %s%s", error, kept)
            self._problem = str(error)
        else:
            self._problem = ""
            log.info("features: snapshot %s of %s", self._snapshot.version, self.folder)

    async def watch(self) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            await self.refresh()

    def _look(self) -> object:
        """What changes whenever another snapshot takes the place."""
        try:
            stat = os.stat(self.folder / MANIFEST)
        except OSError:
            return None
        return stat.st_ino, stat.st_mtime_ns, stat.st_size

    def status(self) -> dict[str, Any]:
        manifest = self._snapshot.manifest if self._snapshot is not None else {}
        version = self._snapshot.version if self._snapshot is not None else None
        return status_of(str(self.folder), version, manifest, self._problem)

    async def close(self) -> None:
        self._snapshot = None
