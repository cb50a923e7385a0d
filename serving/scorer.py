"""The Scorer: one verified bundle, raw values in, scores out. It holds no queue and no thread.

:class:`serving.models.Models` says which Scorer answers, :class:`serving.batching.Batcher` when it computes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import polars as pl

from pipelines.features.transform import encoded_rows, transform
from pipelines.release.bundle import SCORE, Bundle
from pipelines.release.registry import SCHEME, fetch, locate
from serving.batching import Encoded
from serving.forward import Forward
from serving.schemas import ModelCard

Columns = Mapping[str, Any]


class Scorer:
    """Scores requests with one bundle, several in one forward pass. It never changes once it is made.

    Args:
        bundle: verified.
        card: how the model is named in answers.
        int8: whether layers that bear it may be computed in eight bits, where that is faster.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from pipelines.release.example import example_bundle
        >>> bundle = example_bundle(Path(tempfile.mkdtemp()) / "bundle")
        >>> scorer = Scorer(bundle, card_of(bundle))
        >>> one = scorer.encode({"user_id": 3}, {"hour": 9}, [{"item_id": "item-1"}, {"item_id": "new"}])
        >>> two = scorer.encode({"user_id": 4}, {"hour": 9}, [{"item_id": "item-1"}])
        >>> [scores.shape for scores in scorer.run([one, two])]
        [(2,), (1,)]
    """

    def __init__(self, bundle: Bundle, card: ModelCard, *, int8: bool = False) -> None:
        self.bundle, self.card = bundle, card
        self.columns = bundle.state.spec.request_columns
        # Read now: the folder may hold the next bundle by the time that somebody asks.
        self.example = example_request(bundle)
        self.inputs = bundle.golden.drop(SCORE).schema
        golden = [self.encode(**one) for one in golden_requests(bundle)]
        self.forward = Forward(bundle, self._some, golden, int8=int8)

    @classmethod
    def load(cls, source: str, tracking_uri: str | None = None, *, int8: bool = False) -> Scorer:
        """Find, fetch and verify a bundle.

        Args:
            source: ``models:/name@alias``, ``models:/name/version`` or a path.
            tracking_uri: of the MLflow store.
            int8: as for the constructor.

        Raises:
            ArtifactError: it can't be found, or does not prove itself.
        """
        if not source.startswith(SCHEME):
            bundle = Bundle.load(source)
            return cls(bundle, card_of(bundle), int8=int8)
        release = locate(source, tracking_uri)
        bundle = Bundle.load(fetch(release, tracking_uri))
        return cls(bundle, card_of(bundle, release.name, release.version), int8=int8)

    def encode(self, user: Columns, context: Columns, candidates: Sequence[Columns]) -> Encoded:
        """Encode a request for :meth:`run`.

        Raises:
            RequestError: a value can't be encoded.
        """
        if self.bundle.model.shares:
            return Encoded(*self.bundle.encoder.parts(user, context, candidates))
        return Encoded(None, self.bundle.encoder.encode(user, context, candidates))

    def encode_frame(self, frame: pl.DataFrame) -> Encoded:
        """Encode raw rows, in which a user's columns are repeated, for :meth:`run`.

        Raises:
            DataError: a column can't be encoded.
        """
        encoded = transform(self.bundle.state, frame.lazy(), source="request").collect()
        return Encoded(None, encoded_rows(encoded, self.bundle.state.schema()))

    def run(self, requests: Sequence[Encoded]) -> list[np.ndarray]:
        """Score requests that fit each other in one forward pass.

        Returns:
            Click probabilities of each, (N,) float32, in the order of its candidates.
        """
        scores = self.forward(requests)
        return [scores[a:b] for a, b in pairwise(accumulate((len(r) for r in requests), initial=0))]

    def seconds(self, rows: int) -> float:
        """Return how long a pass of so many rows took when it was measured at load; between and beyond, linear."""
        return self.forward.expected(rows)[1]

    def _some(self, rows: int) -> Encoded:
        """Return an encoded request of so many candidates, those of the example again and again."""
        some = self.example["candidates"]
        return self.encode(
            self.example["user"], self.example["context"], [some[i % len(some)] for i in range(rows)]
        )


def card_of(bundle: Bundle, name: str | None = None, version: int | None = None) -> ModelCard:
    """Return how a bundle is named in answers; one from a path by its configuration or its folder."""
    name = name or str(bundle.config.get("name") or bundle.directory.name)
    return ModelCard(name=name, version=version, hash=bundle.hash, gates=bundle.gates)


def example_request(bundle: Bundle, candidates: int = 3) -> dict[str, Any]:
    """Return a request made of golden rows, as plain JSON values."""
    first, *others = golden_requests(bundle, candidates)
    return first | {"candidates": [row for one in (first, *others) for row in one["candidates"]]}


def golden_requests(bundle: Bundle, most: int | None = None) -> list[dict[str, Any]]:
    """Return golden rows as requests of one candidate each, as plain JSON values; all, or so many at most."""
    rows = bundle.golden.drop(SCORE)
    role = {(c.name if c.from_log else c.column): c.role for c in bundle.state.spec.direct}

    def part(row: Columns, wanted: str) -> dict[str, Any]:
        return plain_row({k: v for k, v in row.items() if role[k] == wanted})

    return [
        {"user": part(row, "user"), "context": part(row, "context"), "candidates": [part(row, "item")]}
        for row in (rows if most is None else rows.head(most)).to_dicts()
    ]


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
