"""Who sees which arm: a salted hash of the unit decides, so that nothing has to be remembered."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any

import numpy as np
import polars as pl

from pipelines.experiments.experiment import Arm, Experiment, Online
from pipelines.features.hashing import stable_hash, text_hash

POINTS = 2**32
"""Units fall on so many points; arms own ranges of them."""
LONGEST_ID = 256
"""Characters of a unit's or an item's id."""


def point(unit: str, salt: str) -> int:
    """Return where a unit falls: a whole number below ``POINTS``, uniform, and independent by salt.

    Example:
        >>> point("user 7", "a"), points(pl.Series(["user 7"]), "a")
        (1617455520, array([1617455520]))
    """
    return text_hash(unit, _number(salt)) >> 32


def points(units: pl.Series, salt: str) -> np.ndarray:
    """Return :func:`point` of each unit.

    Args:
        units: N texts.
        salt: as there.

    Returns:
        (N,) int64.
    """
    return (stable_hash(units, _number(salt)) >> np.uint64(32)).astype(np.int64)


@lru_cache(maxsize=1024)
def _number(salt: str) -> int:
    return int.from_bytes(hashlib.sha256(salt.encode()).digest()[:8], "big", signed=True)


class Segments:
    """The ranges of points that each arm owns.

    The first weights lie side by side. When weights change, an arm that shrinks gives up the tail of what it owns,
    and arms that grow share what was given up: everybody else stays. The result depends on the whole history of
    weights, so that is what an experiment keeps.

    Args:
        stages: weights by arm, of any sum, the oldest first.

    Example:
        >>> before, after = Segments([{"a": 9, "b": 1}]), Segments([{"a": 9, "b": 1}, {"a": 1, "b": 1}])
        >>> before.arm(POINTS - 1), after.arm(POINTS - 1), before.arm(POINTS // 2), after.arm(POINTS // 2)
        ('b', 'b', 'a', 'b')
    """

    def __init__(self, stages: Sequence[Mapping[str, float]]) -> None:
        self.names = tuple(stages[0])
        owned = [(0, POINTS, -1)]
        for stage in stages:
            owned = _dealt_anew(owned, _sizes([stage[name] for name in self.names]))
        self._starts = [start for start, _, _ in owned]
        self._owners = [owner for _, _, owner in owned]

    def arm(self, where: int) -> str:
        """Return the arm that owns a point."""
        return self.names[self._owners[bisect_right(self._starts, where) - 1]]

    def codes(self, where: np.ndarray) -> np.ndarray:
        """Return the index in ``names`` of the owner of each point, (N,) int64."""
        return np.array(self._owners)[np.searchsorted(self._starts, where, side="right") - 1]


def _sizes(weights: Sequence[float]) -> list[int]:
    """Split the points by weight, whole, by largest remainder."""
    exact = [weight / sum(weights) * POINTS for weight in weights]
    sizes = [int(x) for x in exact]
    by_remainder = sorted(range(len(sizes)), key=lambda i: sizes[i] - exact[i])
    for i in by_remainder[: POINTS - sum(sizes)]:
        sizes[i] += 1
    return sizes


def _dealt_anew(owned: list[tuple[int, int, int]], sizes: Sequence[int]) -> list[tuple[int, int, int]]:
    """Move as few points as the new sizes allow. Owner -1 owns what nobody has yet."""
    has = [sum(stop - start for start, stop, o in owned if o == i) for i in range(len(sizes))]
    surplus = {i: h - size for i, (h, size) in enumerate(zip(has, sizes, strict=True)) if h > size}
    surplus[-1] = POINTS
    kept, free = [], []
    for start, stop, owner in reversed(owned):
        given = min(surplus.get(owner, 0), stop - start)
        if given:
            surplus[owner] -= given
            free.append((stop - given, stop))
        if given < stop - start:
            kept.append((start, stop - given, owner))
    free.sort(reverse=True)
    for i, size in enumerate(sizes):
        wanted = size - has[i]
        while wanted > 0:
            start, stop = free.pop()
            taken = min(wanted, stop - start)
            kept.append((start, start + taken, i))
            wanted -= taken
            if start + taken < stop:
                free.append((start + taken, stop))
    kept.sort()
    merged = kept[:1]
    for start, stop, owner in kept[1:]:
        if merged[-1][2] == owner:
            merged[-1] = (merged[-1][0], stop, owner)
        else:
            merged.append((start, stop, owner))
    return merged


@dataclass(frozen=True)
class Assignment:
    """A unit in an experiment.

    Args:
        experiment: that it is in.
        unit: that was dealt, as text.
        arm: that serves it.
        shadows: arms that score the request as well, and serve nobody.
        epsilon: share of requests to be answered in random order.
        counted: False for a unit of a paused arm: the control serves it, outside the experiment.
    """

    experiment: str
    unit: str
    arm: Arm
    shadows: tuple[Arm, ...]
    epsilon: float
    counted: bool = True


class Router:
    """Deals the units of requests to the arms of the running experiments.

    Args:
        experiments: those with an online part are dealt; in the order of their names.
        paused: experiments and arms whose units the control serves.

    Example:
        >>> from datetime import UTC
        >>> arms = (Arm(name="open"), Arm(name="gated"))
        >>> e = Experiment(name="gates", control="open", arms=arms, online=Online())
        >>> router, now = Router([e]), datetime(2026, 11, 1, tzinfo=UTC)
        >>> [router.assign({"user_id": i}, at=now)[0].arm.name for i in (1, 4, 1)]
        ['open', 'gated', 'open']
        >>> router.assign({}, at=now)
        ()
    """

    def __init__(self, experiments: Iterable[Experiment], paused: Collection[tuple[str, str]] = ()) -> None:
        self._dealers = [
            _Dealer(e, e.online, {arm for name, arm in paused if name == e.name})
            for e in sorted(experiments, key=lambda e: e.name)
            if e.online
        ]

    def assign(
        self, columns: Mapping[str, Any], *, at: datetime, model: str | None = None
    ) -> tuple[Assignment, ...]:
        """Return the experiments that a request is in, at most one of each layer.

        Args:
            columns: of the request's user and situation.
            at: the time, with its zone.
            model: the model asked for.
        """
        found = (dealer.assign(columns, at, model) for dealer in self._dealers)
        return tuple(assignment for assignment in found if assignment is not None)


class _Dealer:
    """One experiment, made ready for many requests."""

    def __init__(self, experiment: Experiment, online: Online, paused: Collection[str]) -> None:
        self._experiment, self._online, self._paused = experiment, online, paused
        self._arms = {arm.name: arm for arm in experiment.arms}
        self._shadows = tuple(self._arms[name] for name in online.shadow)
        stages = experiment.stages()
        self._times = [stage.at for stage in online.ramp]
        self._segments = [Segments(stages[:i]) for i in range(1, len(stages) + 1)]
        self._salt = "arm\0" + (experiment.allocation.salt or experiment.name)
        group = f"layer {online.layer.name}" if online.layer is not None else f"experiment {experiment.name}"
        self._layer_salt, self._holdout_salt = f"layer\0{group}", f"holdout\0{group}"

    def assign(self, columns: Mapping[str, Any], at: datetime, model: str | None) -> Assignment | None:
        online = self._online
        if online.model is not None and model != online.model:
            return None
        if (online.starts is not None and at < online.starts) or (online.ends is not None and at >= online.ends):
            return None
        unit = unit_text(columns.get(online.unit))
        if unit is None or not all(condition.holds(columns) for condition in self._experiment.population):
            return None
        layer = online.layer
        if layer is not None and not layer.start <= point(unit, self._layer_salt) / POINTS < layer.stop:
            return None
        if online.holdout and point(unit, self._holdout_salt) < online.holdout * POINTS:
            return None
        segments = self._segments[bisect_right(self._times, at)]
        arm = self._arms[segments.arm(point(unit, self._salt))]
        if arm.name in self._paused:
            control = self._arms[self._experiment.control]
            return Assignment(self._experiment.name, unit, control, (), 0.0, counted=False)
        return Assignment(self._experiment.name, unit, arm, self._shadows, online.epsilon)


def unit_text(value: Any) -> str | None:
    """Return a unit's id as the text that is hashed; None for what is no id.

    Example:
        >>> unit_text(7), unit_text("7"), unit_text(True), unit_text(1.5), unit_text("")
        ('7', '7', None, None, None)
    """
    if isinstance(value, str):  # PostgreSQL's texts hold no NUL, and its indexes no long ones
        return value if 0 < len(value) <= LONGEST_ID and "\0" not in value else None
    return str(value) if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**64 else None


def order(scores: np.ndarray, *, epsilon: float, seed: str) -> tuple[np.ndarray, np.ndarray]:
    """Decide on which position each candidate goes: best score first, or with chance ``epsilon`` at random.

    propensity_i = (1 - epsilon) [position_i = rank_i] + epsilon / N

    Args:
        scores: (N,); of equal ones the earlier candidate goes first.
        epsilon: chance of a uniformly random order.
        seed: the request's id: a request that is sent again gets the same order.

    Returns:
        positions from 0, (N,) int64, and the chance that the policy puts each candidate where it is, (N,) float64.

    Example:
        >>> positions, propensities = order(np.array([0.1, 0.9]), epsilon=0.0, seed="request 1")
        >>> positions.tolist(), propensities.tolist()
        ([1, 0], [1.0, 1.0])
    """
    count, best = len(scores), ranks(scores)
    positions = best
    if drawn(epsilon, seed):
        positions = np.random.default_rng(text_hash(seed, _number("order"))).permutation(count)
    return positions, (1 - epsilon) * (positions == best) + epsilon / count


def drawn(epsilon: float, seed: str) -> bool:
    """Say whether :func:`order` is random for this request."""
    return epsilon > 0 and point(seed, "epsilon") < epsilon * POINTS


def ranks(scores: np.ndarray) -> np.ndarray:
    """Return the place of each score, the best 0; of equal ones the earlier goes first.

    Example:
        >>> ranks(np.array([0.1, 0.9, 0.1])).tolist()
        [1, 0, 2]
    """
    found = np.empty(len(scores), dtype=np.int64)
    found[np.argsort(-scores, kind="stable")] = np.arange(len(scores))
    return found
