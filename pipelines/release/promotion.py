"""Promotion: which version an alias means, moved only when the figures allow it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ctr_models.errors import ArtifactError, ConfigError
from pipelines.release.registry import SCHEME, Release, locate, releases
from pipelines.release.store import connect, default_uri, locked, shown

CHAMPION, PREVIOUS = "champion", "previous"


@dataclass(frozen=True)
class Bars:
    """What a version must reach to be promoted; None asks for nothing.

    Args:
        min_auc: smallest AUC.
        max_auc_drop: largest loss of AUC against the version that holds the alias now.
        max_logloss_increase: largest rise of logloss against it.
    """

    min_auc: float | None = None
    max_auc_drop: float | None = None
    max_logloss_increase: float | None = None

    def misses(self, challenger: Release, champion: Release | None) -> list[str]:
        """Return a reason for each bar that the challenger misses.

        Both are judged on test metrics, or on validation metrics when one of the two has no others. Without a
        champion the comparisons ask for nothing.

        Example:
            >>> new, old = Release("m", 2, metrics={"test_auc": 0.79}), Release("m", 1, metrics={"test_auc": 0.8})
            >>> Bars(max_auc_drop=0.005).misses(new, old)
            ['test_auc 0.79000 is 0.01000 below version 1 (0.80000); at most 0.00500 is allowed']
        """
        reasons = []
        if self.min_auc is not None:
            name, auc, _ = _metric("auc", challenger, None)
            if not auc >= self.min_auc:
                reasons.append(f"{name} {auc:.5f} is below the bar {self.min_auc:.5f}")
        if champion is not None and self.max_auc_drop is not None:
            name, new, old = _metric("auc", challenger, champion)
            if not old - new <= self.max_auc_drop:
                reasons.append(
                    f"{name} {new:.5f} is {old - new:.5f} below version {champion.version} ({old:.5f}); "
                    f"at most {self.max_auc_drop:.5f} is allowed"
                )
        if champion is not None and self.max_logloss_increase is not None:
            name, new, old = _metric("logloss", challenger, champion)
            if not new - old <= self.max_logloss_increase:
                reasons.append(
                    f"{name} {new:.5f} is {new - old:.5f} above version {champion.version} ({old:.5f}); "
                    f"at most {self.max_logloss_increase:.5f} is allowed"
                )
        return reasons


@dataclass(frozen=True)
class Decision:
    """What a promotion did, or would have done.

    Args:
        name: of the registered model.
        alias: that was to move.
        version: that it was to mean.
        was: what it meant before; None if nothing.
        promoted: whether it moved.
        reasons: why it did not.
        dry_run: nothing was to be moved.
    """

    name: str
    alias: str
    version: int
    was: int | None
    promoted: bool
    reasons: tuple[str, ...] = ()
    dry_run: bool = False

    @property
    def allowed(self) -> bool:
        """Whether every bar was reached."""
        return not self.reasons

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {**asdict(self), "allowed": self.allowed}


def promote(
    name: str,
    version: int | str,
    to: str = CHAMPION,
    *,
    bars: Bars | None = None,
    dry_run: bool = False,
    tracking_uri: str | None = None,
) -> Decision:
    """Let an alias mean a version, if the version reaches the bars.

    What the alias meant before is kept under :func:`previous_of` it, from where :func:`rollback` takes it.
    Promoting the version that holds the alias already changes nothing.

    Args:
        name: of the registered model.
        version: a version, or an alias that means one.
        to: the alias to move.
        bars: what to reach; none by default.
        dry_run: decide, but move nothing.
        tracking_uri: None is the store under ``runs``.

    Raises:
        ArtifactError: no such model, version or alias.
        ConfigError: ``to`` can't be an alias.
    """
    uri = tracking_uri or default_uri()
    if to == PREVIOUS or to.startswith(f"{PREVIOUS}-"):
        raise ConfigError(f"alias {to!r} is kept for what another meant before", remedy="choose another alias")
    separator = "/" if str(version).isdigit() else "@"
    client = connect(uri)
    with locked(uri):
        challenger = locate(f"{SCHEME}{name}{separator}{version}", uri)
        champion = next((r for r in releases(name, uri) if to in r.aliases), None)
        was = champion.version if champion else None
        unchanged = was == challenger.version
        reasons = () if unchanged else tuple((bars or Bars()).misses(challenger, champion))
        move = not reasons and not dry_run
        if move and not unchanged:
            if was is not None:  # kept first: a call that is broken off must not lose it
                _set_alias(client, name, previous_of(to), was)
            _set_alias(client, name, to, challenger.version)
    return Decision(name, to, challenger.version, was, move, reasons, dry_run)


def previous_of(alias: str) -> str:
    """Return the alias that keeps what ``alias`` meant before: each has its own, or one would undo another's move.

    Example:
        >>> previous_of("champion"), previous_of("shadow")
        ('previous', 'previous-shadow')
    """
    return PREVIOUS if alias == CHAMPION else f"{PREVIOUS}-{alias}"


def rollback(name: str, to: str = CHAMPION, *, dry_run: bool = False, tracking_uri: str | None = None) -> Decision:
    """Let an alias mean again what it meant before; doing it twice restores the first state.

    Raises:
        ArtifactError: nothing is kept.
    """
    uri = tracking_uri or default_uri()
    client = connect(uri)
    with locked(uri):
        found = releases(name, uri)
        previous = next((r for r in found if previous_of(to) in r.aliases), None)
        current = next((r for r in found if to in r.aliases), None)
        if previous is None:
            raise ArtifactError(
                f"model {name!r} has no previous version to go back to as {to}",
                where=shown(uri),
                remedy=f"sluice promote {name} --version N --to {to}",
            )
        if not dry_run:
            _set_alias(client, name, to, previous.version)
            if current is not None:
                _set_alias(client, name, previous_of(to), current.version)
    return Decision(name, to, previous.version, current.version if current else None, not dry_run, (), dry_run)


def _metric(kind: str, challenger: Release, champion: Release | None) -> tuple[str, float, float]:
    """The metric by its name and its values for both; test before valid before bare."""
    both = [challenger, champion] if champion else [challenger]
    for name in (f"test_{kind}", f"valid_{kind}", kind):
        if all(name in r.metrics for r in both):
            return name, challenger.metrics[name], champion.metrics[name] if champion else float("nan")
    versions = " and ".join(str(r.version) for r in both)
    raise ArtifactError(
        f"version {versions} {'share' if champion else 'has'} no {kind} to judge by",
        where=challenger.uri,
        remedy="register it with metrics, or promote without bars",
    )


def _set_alias(client: Any, name: str, alias: str, version: int) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.set_registered_model_alias(name, alias, str(version))
    except MlflowException as error:
        raise ConfigError(
            f"{alias!r} can't be an alias: {str(error).splitlines()[0][:200]}", where="--to"
        ) from None
