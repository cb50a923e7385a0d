"""Experiments that run online: checked, stored in every version, and dealt by the router."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import msgspec
import sqlalchemy as sa

from ctr_models.errors import ConfigError, nearest
from pipelines.experiments.experiment import Experiment, Online, Stage
from serving.database import EXPERIMENTS, PAUSES, Database, experiments, pauses
from serving.router import Router

log = logging.getLogger("sluice.experiments")


class Conflict(Exception):
    """An experiment can't be stored beside the others, or in place of its own earlier version."""


@dataclass(frozen=True)
class Pause:
    """Why an arm serves nobody, or does so again.

    Args:
        paused: whether it is paused from then on.
        at: when, in microseconds since 1970.
        reason: for people.
        number: how many there were of this arm, this one included.
    """

    paused: bool
    at: int
    reason: str
    number: int


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
        self._pauses: dict[tuple[str, str], Pause] = {}
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
        paused = {
            (row.experiment, row.arm): Pause(row.paused, row.time, row.reason, row.number)
            for row in self._database.rows(sa.select(pauses).order_by(pauses.c.number))
        }
        if found != self._known or paused != self._pauses:
            self._known, self._pauses = found, paused
            shut = {arm for arm, pause in paused.items() if pause.paused}
            self.router = Router((experiment for _, experiment in found.values()), shut)

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

    def pause(self, name: str, arm: str, reason: str) -> Pause:
        """Let the control serve an arm's units until :meth:`resume`; one that is paused stays as it is.

        Raises:
            ConfigError: no such experiment or arm, or none that could be paused.
            Unavailable: the database can't be written now.
        """
        return self._set(name, arm, True, reason)

    def resume(self, name: str, arm: str, reason: str = "") -> Pause:
        """Let an arm serve its units again; results begin anew.

        Raises:
            ConfigError, Unavailable: as :meth:`pause`.
        """
        return self._set(name, arm, False, reason)

    def _set(self, name: str, arm: str, paused: bool, reason: str) -> Pause:
        self.refresh()
        experiment = self.get(name)
        live = [one for one in experiment.stages()[0] if one != experiment.control]
        if arm not in live:
            raise ConfigError(
                f"no arm {arm!r} that could be paused", where=f"experiment {name!r}", remedy=nearest(arm, live)
            )
        last = self._pauses.get((name, arm), Pause(False, 0, "", 0))
        if last.paused != paused:
            made = {"paused": paused, "time": time.time_ns() // 1000, "reason": reason, "number": last.number + 1}
            self._database.insert([(PAUSES, {"experiment": name, "arm": arm, **made})])
            self.refresh()
            last = self._pauses[name, arm]
            log.warning("experiment %s: arm %s is %s: %s", name, arm, "paused" if paused else "resumed", reason)
        return last

    def paused(self, name: str) -> dict[str, Pause]:
        """Return the last pause, or resumption, of each arm that ever had one."""
        return {arm: pause for (experiment, arm), pause in self._pauses.items() if experiment == name}

    def pause_log(self, name: str) -> list[tuple[str, Pause]]:
        """Return every pause and resumption of an experiment's arms, in the order of time.

        Raises:
            Unavailable: the database can't be read now.
        """
        query = sa.select(pauses).where(pauses.c.experiment == name).order_by(pauses.c.time, pauses.c.number)
        return [
            (row.arm, Pause(row.paused, row.time, row.reason, row.number)) for row in self._database.rows(query)
        ]

    def versions(self, name: str) -> list[tuple[int, datetime, Experiment]]:
        """Return every version that can be read: number, when it was stored, and the experiment.

        Raises:
            Unavailable: the database can't be read now.
        """
        query = sa.select(experiments.c.version, experiments.c.created, experiments.c.body)
        found = []
        for version, created, body in self._database.rows(
            query.where(experiments.c.name == name).order_by(experiments.c.version)
        ):
            with suppress(ConfigError):  # of another release; refresh has told
                found.append((version, datetime.fromtimestamp(created / 1e6, UTC), _read(body)))
        return found

    def get(self, name: str) -> Experiment:
        """Return an experiment.

        Raises:
            ConfigError: there is none of that name; with the nearest.
        """
        if name not in self._known:
            raise ConfigError(f"no experiment {name!r}", remedy=nearest(name, self._known))
        return self._known[name][1]

    def list(self, *, at: datetime | None = None) -> list[dict[str, Any]]:
        """Return what is known of each: version, state, shares in force, paused arms, and the experiment itself."""
        now = at or datetime.now(UTC)
        return [
            {
                "version": version,
                "state": state(experiment, now),
                "shares": shares(experiment, now),
                "paused": {arm: pause.reason for arm, pause in self.paused(name).items() if pause.paused},
                "experiment": experiment.to_tree(),
            }
            for name, (version, experiment) in sorted(self._known.items())
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
        "weights so far": (_begun(last, now), _begun(experiment, now)),
    }
    for what, (old, new) in fixed.items():
        if old != new:
            remedy = (
                "add a stage to online.ramp that begins later" if what == "weights so far" else "give another name"
            )
            raise Conflict(f"{experiment.name!r} has begun, so its {what} can't change; {remedy}")


def _begun(experiment: Experiment, now: datetime) -> tuple[dict[str, float], list[Stage]]:
    """What the units of now and of before were dealt by: the first weights, and the stages that have begun."""
    ramp = experiment.online.ramp if experiment.online is not None else ()
    return experiment.stages()[0], [stage for stage in ramp if stage.at <= now]


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
    """Refuse parts of a layer that overlap, or are parts of different units, while both run."""
    mine = experiment.online
    assert mine is not None
    for other in others:
        theirs = other.online
        if other.name == experiment.name or theirs is None or mine.layer is None or theirs.layer is None:
            continue
        one, two = mine.layer, theirs.layer
        if one.name != two.name or not _meet(mine, theirs, now):
            continue
        if mine.unit != theirs.unit:  # a request may then be in both
            raise Conflict(
                f"{other.name!r} deals layer {two.name!r} by {theirs.unit!r}, not by {mine.unit!r}; "
                "take the same unit or another layer"
            )
        if one.start < two.stop and two.start < one.stop:
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
