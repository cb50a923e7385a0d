"""The Bundle behind the routes: loaded once, scoring on worker threads so that the event loop never waits."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from pipelines.release.bundle import SCORE, Bundle
from pipelines.release.registry import SCHEME, fetch, locate
from serving.schemas import ModelCard
from serving.settings import Settings

Columns = Mapping[str, Any]


class Scorer:
    """Scores requests with one bundle.

    :meth:`score` is where concurrent requests meet: whatever batches them together belongs behind it.

    Args:
        bundle: verified.
        card: how the model is named in answers.
        workers: requests scored at once, one core each.
    """

    def __init__(self, bundle: Bundle, card: ModelCard, *, workers: int = 1) -> None:
        self.bundle, self.card = bundle, card
        self.columns = bundle.state.spec.request_columns
        self._pool = ThreadPoolExecutor(
            workers, thread_name_prefix="scorer", initializer=torch.set_num_threads, initargs=(1,)
        )

    @classmethod
    def load(cls, settings: Settings) -> Scorer:
        """Find, fetch and verify the bundle that the settings name.

        Raises:
            ArtifactError: it can't be found, or does not prove itself.
        """
        if settings.model.startswith(SCHEME):
            release = locate(settings.model, settings.tracking_uri)
            bundle = Bundle.load(fetch(release, settings.tracking_uri))
            name, number = release.name, release.version
        else:
            bundle = Bundle.load(settings.model)
            name, number = str(bundle.config.get("name") or bundle.directory.name), None
        card = ModelCard(name=name, version=number, hash=bundle.hash, gates=bundle.gates)
        return cls(bundle, card, workers=settings.workers)

    async def score(self, user: Columns, context: Columns, candidates: Sequence[Columns]) -> np.ndarray:
        """Return click probabilities, (N,) float32, in the order of the candidates.

        Raises:
            RequestError: a value can't be encoded.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, self.bundle.score_request, user, context, candidates)

    def example(self, candidates: int = 3) -> dict[str, Any]:
        """Return a request made of golden rows, as plain JSON values."""
        spec = self.bundle.state.spec
        rows = self.bundle.golden.drop(SCORE).head(candidates).to_dicts()
        role = {(c.name if c.from_log else c.column): c.role for c in spec.direct}

        def part(row: Columns, wanted: str) -> dict[str, Any]:
            return plain_row({k: v for k, v in row.items() if role[k] == wanted})

        return {
            "user": part(rows[0], "user"),
            "context": part(rows[0], "context"),
            "candidates": [part(row, "item") for row in rows],
        }

    def close(self) -> None:
        """Let running requests end, and take no more."""
        self._pool.shutdown(wait=True)


def plain_row(row: Columns) -> dict[str, Any]:
    """Return a raw row as JSON can carry it; what is missing, and what is no number, is left out.

    Example:
        >>> plain_row({"item": 3, "price": float("nan"), "tags": ["a", None], "city": None})
        {'item': 3, 'tags': ['a']}
    """
    return {name: plain for name, value in row.items() if (plain := _plain(value)) is not None}


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [plain for v in value if (plain := _plain(v)) is not None]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)
