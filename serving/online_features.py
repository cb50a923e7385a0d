"""Stored features of users and items, looked up by id for every request: a snapshot here, or Redis for fleets.

What the store does not know is scored as training saw it: columns missing, no history, ids out of vocabulary. A
store that can't be reached or does not prove itself makes no request fail; answers and readiness tell of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pipelines.features.candidate_columns import CandidateColumns
from pipelines.features.overlay import overlaid
from pipelines.features.spec import FeatureSpec
from pipelines.features.stored import Stored
from serving.schemas import Missing, StoredFeatures

Columns = Mapping[str, Any]
Request = tuple[Columns, Columns, Sequence[Columns]]
"""User, context and candidates."""

LOOK_SECONDS = 1.0
"""How often a store is looked at."""


@dataclass(frozen=True)
class Found:
    """What a store holds of the user and the candidates of one request.

    Args:
        user: columns; None if there are none.
        items: likewise of each candidate.
        version: of what is stored; None while the store can't answer.
    """

    user: dict[str, Any] | None
    items: list[dict[str, Any] | None]
    version: str | None

    @classmethod
    def nothing(cls, item_ids: Sequence[Any]) -> Found:
        """Return what a store that can't answer gives."""
        return cls(None, [None] * len(item_ids), None)

    def fill(self, spec: FeatureSpec, user: Columns, context: Columns, candidates: Sequence[Columns]) -> Request:
        """Fill in what a request leaves out, or gives as null; what it gives wins.

        Args:
            spec: of the model that will score it; columns it does not read stay out.
            user: as the request gives it.
            context: likewise.
            candidates: likewise.

        Example:
            >>> spec = FeatureSpec.model_validate({"label": "click", "columns": [
            ...     {"name": name, "kind": "categorical"} for name in ("city", "ad", "shop")]})
            >>> found = Found({"city": "Graz", "age": 7}, [{"shop": 1}, None], "v1")
            >>> found.fill(spec, {}, {}, [{"ad": 3}, {"ad": 4}])
            ({'city': 'Graz'}, {}, [{'shop': 1, 'ad': 3}, {'ad': 4}])
        """
        # A name that user or context give holds for every candidate that gives none.
        free = set(spec.request_columns).difference(k for k, v in overlaid(user, context).items() if v is not None)
        filled = [
            overlaid(_only(item, free), one) if item else one
            for item, one in zip(self.items, candidates, strict=True)
        ]
        return overlaid(_only(self.user or {}, free), user), context, filled

    def report(self, user_id: Any, item_ids: Sequence[Any]) -> StoredFeatures:
        """Say in an answer what was not there, of what was asked for."""
        missing = [one for one, item in zip(item_ids, self.items, strict=True) if item is None and one is not None]
        return StoredFeatures(
            available=self.version is not None,
            version=self.version,
            missing=Missing(user=self.user is None and user_id is not None, items=list(dict.fromkeys(missing))),
        )


class OnlineFeatures(Protocol):
    """A store of features, as routes use it."""

    @property
    def stored(self) -> Stored | None:
        """What it holds; None while it can't answer."""
        ...

    async def fetch(self, spec: FeatureSpec, user_id: Any, item_ids: Sequence[Any]) -> Found:
        """Look up a user and items by raw ids, as a model names them; None is nobody. Never raises."""
        ...

    async def refresh(self) -> None:
        """Look whether the store is there, and whether it holds something new."""
        ...

    async def watch(self) -> None:
        """Keep up with the store until cancelled."""
        ...

    def status(self) -> dict[str, Any]:
        """Return what readiness tells of it."""
        ...

    async def close(self) -> None:
        """Let go of it."""
        ...


def open_features(where: str, *, timeout_seconds: float) -> OnlineFeatures:
    """Return the store at a path or at the URL of a Redis, not looked at yet.

    Raises:
        ConfigError: the URL is none.
    """
    if where.startswith(("redis://", "rediss://", "unix://")):
        from serving.redis_features import RedisFeatures

        return RedisFeatures(where, timeout_seconds=timeout_seconds)
    from serving.snapshot_features import SnapshotFeatures

    return SnapshotFeatures(Path(where))


def status_for(features: OnlineFeatures, specs: Mapping[str, FeatureSpec]) -> dict[str, Any]:
    """Return what readiness tells of a store: its own status, and what models need that it does not hold.

    Args:
        features: the store.
        specs: of the models, by slot.
    """
    status, stored = features.status(), features.stored
    if stored is not None:
        lacks = {slot: lacking for slot, spec in specs.items() if (lacking := stored.lacks(spec))}
        status |= {"lacks": lacks} if lacks else {}
    return status


def ids_of(
    spec: FeatureSpec, user: Columns, context: Columns, candidates: Sequence[Columns]
) -> tuple[Any, list[Any]]:
    """Return the raw ids in a request, of the user and of each candidate; None where there is none."""
    common = overlaid(user, context)
    user_id = common.get(spec.user) if spec.user is not None else None
    if spec.item is None:
        return _id(user_id), [None] * len(candidates)
    if isinstance(candidates, CandidateColumns):
        item_ids = candidates.columns.get(spec.item, [None] * len(candidates))
    else:
        item_ids = [c.get(spec.item) for c in candidates]
    of_all = common.get(spec.item)
    return _id(user_id), [_id(of_all if one is None else one) for one in item_ids]


def _id(value: Any) -> Any:
    """An id, or None for what is missing, as empty text and NaN are, and for what the encoder will refuse."""
    return value if isinstance(value, str | int | float) and value != "" and value == value else None


def _only(stored: dict[str, Any], names: set[str]) -> dict[str, Any]:
    return stored if names.issuperset(stored) else {k: v for k, v in stored.items() if k in names}


def stored_ids(
    stored: Stored, spec: FeatureSpec, user_id: Any, item_ids: Sequence[Any]
) -> tuple[str | None, list[str | None]]:
    """Return raw ids as they are stored; None where there is none, or none can be.

    Nor are there any by the names of another column than the store's: equal ids would be others there.
    """
    user, item = stored.user, stored.item
    user_form = user.id(user_id) if user is not None and user.key == spec.user else None
    if item is None or item.key != spec.item:
        return user_form, [None] * len(item_ids)
    return user_form, [item.id(one) for one in item_ids]


def status_of(where: str, version: str | None, manifest: dict[str, Any], problem: str) -> dict[str, Any]:
    """Return what readiness tells of a store: where it is, what it holds, and what is wrong with it."""
    told: dict[str, Any] = {"store": where, "version": version, "at": manifest.get("at")}
    if "rows" in manifest:
        told["rows"] = manifest["rows"]
    return {**told, "problem": problem} if problem else told
