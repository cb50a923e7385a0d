"""Experiments that run online: checked, stored in every version, and dealt by the router."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

import msgspec
import sqlalchemy as sa

from ctr_models.errors import ConfigError, nearest
from pipelines.experiments.experiment import Experiment, Online
from serving.database import EXPERIMENTS, Database, experiments
from serving.router import Router

log = logging.getLogger("sluice.experiments")


class Conflict(Exception):
    """An experiment can't be stored beside the others, or in place of its own earlier version."""


class Experiments:
    """The experiments of a database, and a router over those in force.

    :meth:`refresh` is called now and then, so that what one process stores reaches the others. While the database
    is away the last known experiments stay in force.

    Args:
        database: where they are stored.

    Example:
        >>> import tempfile
        >>> database = Database(f"sqlite:///{tempfile.mkdtemp()}/events.db")
        >>> database.create()
        >>> kept = Experiments(database)
        >>> arms = [{"name": "open"}, {"name": "gated", "bundle": "models:/clicks@challenger"}]
        >>> made = Experiment.from_tree({"name": "gates", "control": "open", "arms": arms, "online": {}})
        >>> kept.put(made), kept.put(made), kept.get("gates") == made
        (1, 1, True)
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._known: dict[str, tuple[int, Experiment]] = {}
        self.router = Router(())

    def refresh(self) -> None:
        """Read what is stored.

        Raises:
            Unavailable: the database can't be read; nothing changes.
        """
        found = {}
        for name, version, body in self._database.rows(_latest()):
            known = self._known.get(name)
            try:
                found[name] = known if known and known[0] == version else (version, _read(body))
            except ConfigError as error:  # of a later release, perhaps: the others go on
                log.error("experiment %s, version %d, can't be read: %s", name, version, error)
        if found != self._known:
            self._known = found
            self.router = Router(experiment for _, experiment in found.values())

    def put(self, experiment: Experiment, *, at: datetime | None = None) -> int:
        """Store an experiment, or a new version of one, and deal by it from now on.

        Args:
            experiment: with an online part.
            at: the time; what is past by then can't change.

        Returns:
            its version; that of the last one if nothing changed.

        Raises:
            Conflict: it can't stand beside another, or would move units that were dealt already.
            ConfigError: it has no online part.
            Unavailable: the database can't be written now.
        """
        if experiment.online is None:
            raise ConfigError(
                "the experiment is offline only", where=f"experiment {experiment.name!r}", remedy="add online: {}"
            )
        now = at or datetime.now(UTC)
        self.refresh()
        version, last = self._known.get(experiment.name, (0, None))
        if last == experiment:
            return version
        if last is not None:
            _check_successor(last, experiment, now)
        others = [known for _, known in self._known.values()]
        _check_layer(experiment, others, now)
        _check_models(experiment, others, now)
        row = {
            "name": experiment.name,
            "version": version + 1,
            "body": experiment.model_dump_json(exclude_defaults=True),
            "created": time.time_ns() // 1000,
        }
        self._database.insert([(EXPERIMENTS, row)])
        self.refresh()
        if self._known[experiment.name][1] != experiment:  # the key was taken, and the first one wins
            raise Conflict(f"somebody else stored version {version + 1} of {experiment.name!r} at the same time")
        return version + 1

    def get(self, name: str) -> Experiment:
        """Return an experiment.

        Raises:
            ConfigError: there is none of that name; with the nearest.
        """
        if name not in self._known:
            raise ConfigError(f"no experiment {name!r}", remedy=nearest(name, self._known))
        return self._known[name][1]

    def list(self, *, at: datetime | None = None) -> list[dict[str, Any]]:
        """Return what is known of each: name, version, state, shares in force, and the experiment itself."""
        now = at or datetime.now(UTC)
        return [
            {"version": version, "state": state(experiment, now), "shares": shares(experiment, now)}
            | {"experiment": experiment.to_tree()}
            for _, (version, experiment) in sorted(self._known.items())
        ]


def state(experiment: Experiment, at: datetime) -> str:
    """Return ``offline``, ``planned``, ``running`` or ``ended``."""
    online = experiment.online
    if online is None:
        return "offline"
    if online.starts is not None and at < online.starts:
        return "planned"
    return "ended" if online.ends is not None and at >= online.ends else "running"


def shares(experiment: Experiment, at: datetime) -> dict[str, float]:
    """Return the share of units that each serving arm has, of those in the experiment."""
    weights = experiment.stages(at)[-1]
    return {name: weight / sum(weights.values()) for name, weight in weights.items()}


def _check_successor(last: Experiment, experiment: Experiment, now: datetime) -> None:
    """Refuse a version that would deal anew who was dealt already."""
    before, after = last.online, experiment.online
    if before is None or after is None:
        return
    if before.starts is not None and before.starts > now:
        return
    fixed = {
        "salt": (last.allocation.salt, experiment.allocation.salt),
        "unit": (before.unit, after.unit),
        "starts": (before.starts, after.starts),
        "arms": ([a.name for a in last.arms], [a.name for a in experiment.arms]),
        "control": (last.control, experiment.control),
        "shadow": (before.shadow, after.shadow),
        "layer": (before.layer and before.layer.name, after.layer and after.layer.name),
        "weights so far": (last.stages(now), experiment.stages(now)),
    }
    for what, (old, new) in fixed.items():
        if old != new:
            remedy = (
                "add a stage to online.ramp that begins later" if what == "weights so far" else "give another name"
            )
            raise Conflict(f"{experiment.name!r} has begun, so its {what} can't change; {remedy}")


def _check_models(experiment: Experiment, others: Iterable[Experiment], now: datetime) -> None:
    """Refuse two experiments that may both choose the model of one request."""
    mine = experiment.online
    for other in others:
        theirs = other.online
        if other.name == experiment.name or mine is None or theirs is None:
            continue
        if not (_chooses(experiment) and _chooses(other)) or not _meet(mine, theirs, now):
            continue
        apart = mine.model is not None and theirs.model is not None and mine.model != theirs.model
        layered = mine.layer is not None and theirs.layer is not None and mine.layer.name == theirs.layer.name
        if not apart and not layered:
            raise Conflict(f"{other.name!r} chooses the model of the same requests; put both into one layer")


def _chooses(experiment: Experiment) -> bool:
    shadow = experiment.online.shadow if experiment.online is not None else ()
    return any(arm.bundle is not None for arm in experiment.arms if arm.name not in shadow)


def _check_layer(experiment: Experiment, others: Iterable[Experiment], now: datetime) -> None:
    """Refuse parts of a layer that overlap while both run."""
    mine = experiment.online
    assert mine is not None
    for other in others:
        theirs = other.online
        if other.name == experiment.name or theirs is None or mine.layer is None or theirs.layer is None:
            continue
        one, two = mine.layer, theirs.layer
        if one.name == two.name and one.start < two.stop and two.start < one.stop and _meet(mine, theirs, now):
            raise Conflict(
                f"{other.name!r} has {two.start:g} to {two.stop:g} of layer {two.name!r}; take another part or time"
            )


def _meet(one: Online, two: Online, now: datetime) -> bool:
    """Tell whether two experiments ever run at the same time, from now on."""
    starts = [s for s in (one.starts, two.starts, now) if s is not None]
    ends = [e for e in (one.ends, two.ends) if e is not None]
    return not ends or max(starts) < min(ends)


def _latest() -> sa.Select[Any]:
    last = sa.select(experiments.c.name, sa.func.max(experiments.c.version).label("version"))
    last_of = last.group_by(experiments.c.name).subquery()
    joined = sa.and_(experiments.c.name == last_of.c.name, experiments.c.version == last_of.c.version)
    return sa.select(experiments.c.name, experiments.c.version, experiments.c.body).join(last_of, joined)


def _read(body: str) -> Experiment:
    return Experiment.from_tree(msgspec.json.decode(body))
