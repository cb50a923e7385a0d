"""An alias moves when the bars are reached, the former holder is kept, and a rollback undoes it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from ctr_models.errors import ArtifactError, ConfigError
from pipelines.release import promotion
from pipelines.release.promotion import Bars, promote, rollback
from pipelines.release.registry import Release, releases
from pipelines.release.store import connect, default_uri

METRICS = {
    1: {"test_auc": 0.700, "test_logloss": 0.500},
    2: {"test_auc": 0.710, "test_logloss": 0.495},
    3: {"test_auc": 0.690, "test_logloss": 0.510},
    4: {"valid_auc": 0.720},
}


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry with four versions of ``clicks``, made without bundles; making a store takes seconds."""
    folder = tmp_path_factory.mktemp("store")
    client = connect(default_uri(folder))
    client.create_registered_model("clicks")
    for metrics in METRICS.values():
        tags = {f"metric.{k}": repr(v) for k, v in metrics.items()}
        client.create_model_version("clicks", source=folder.as_uri(), tags=tags)
    return folder / "mlflow.db"


@pytest.fixture
def uri(database: Path, tmp_path: Path) -> str:
    """A copy of it."""
    shutil.copy(database, tmp_path)
    return default_uri(tmp_path)


def aliases(uri: str) -> dict[str, int]:
    return {alias: r.version for r in releases("clicks", uri) for alias in r.aliases}


def test_the_former_champion_is_kept_and_comes_back(uri: str) -> None:
    assert promote("clicks", 1, tracking_uri=uri).was is None
    decision = promote("clicks", 2, tracking_uri=uri)
    assert (decision.was, decision.promoted) == (1, True)
    assert aliases(uri) == {"champion": 2, "previous": 1}
    assert rollback("clicks", tracking_uri=uri).version == 1
    assert aliases(uri) == {"champion": 1, "previous": 2}
    rollback("clicks", tracking_uri=uri)
    assert aliases(uri) == {"champion": 2, "previous": 1}


def test_promoting_the_champion_again_changes_nothing(uri: str) -> None:
    promote("clicks", 1, tracking_uri=uri)
    promote("clicks", 2, tracking_uri=uri)
    decision = promote("clicks", 2, bars=Bars(min_auc=0.99), tracking_uri=uri)
    assert decision.allowed
    assert aliases(uri) == {"champion": 2, "previous": 1}


def test_a_version_may_be_given_by_its_alias(uri: str) -> None:
    promote("clicks", 2, "challenger", tracking_uri=uri)
    assert promote("clicks", "challenger", tracking_uri=uri).version == 2
    assert aliases(uri) == {"challenger": 2, "champion": 2}


def test_dry_run_decides_but_moves_nothing(uri: str) -> None:
    promote("clicks", 1, tracking_uri=uri)
    decision = promote("clicks", 2, dry_run=True, tracking_uri=uri)
    assert decision.allowed
    assert not decision.promoted
    assert aliases(uri) == {"champion": 1}


def test_there_may_be_nothing_to_go_back_to(uri: str) -> None:
    promote("clicks", 1, tracking_uri=uri)
    with pytest.raises(ArtifactError, match="has no previous version to go back to"):
        rollback("clicks", tracking_uri=uri)


@pytest.mark.parametrize(
    ("bars", "reason"),
    [
        (Bars(min_auc=0.695), "test_auc 0.69000 is below the bar 0.69500"),
        (
            Bars(max_auc_drop=0.005),
            "test_auc 0.69000 is 0.01000 below version 1 (0.70000); at most 0.00500 is allowed",
        ),
        (
            Bars(max_logloss_increase=0.001),
            "test_logloss 0.51000 is 0.01000 above version 1 (0.50000); at most 0.00100 is allowed",
        ),
    ],
)
def test_a_missed_bar_refuses_with_its_reason(uri: str, bars: Bars, reason: str) -> None:
    promote("clicks", 1, tracking_uri=uri)
    decision = promote("clicks", 3, bars=bars, tracking_uri=uri)
    assert not decision.promoted
    assert decision.reasons == (reason,)
    assert aliases(uri) == {"champion": 1}


def test_every_missed_bar_is_told(uri: str) -> None:
    promote("clicks", 1, tracking_uri=uri)
    decision = promote("clicks", 3, bars=Bars(0.695, 0.005, 0.001), tracking_uri=uri)
    assert len(decision.reasons) == 3


def test_nan_reaches_no_bar() -> None:
    new = Release("m", 2, metrics={"auc": float("nan"), "logloss": float("nan")})
    old = Release("m", 1, metrics={"auc": 0.7, "logloss": 0.5})
    assert len(Bars(0.1, 0.5, 0.5).misses(new, old)) == 3


def test_bars_need_a_metric_in_common(uri: str) -> None:
    promote("clicks", 1, tracking_uri=uri)
    with pytest.raises(ArtifactError, match="version 4 and 1 share no auc to judge by"):
        promote("clicks", 4, bars=Bars(max_auc_drop=0.1), tracking_uri=uri)


@pytest.mark.parametrize(
    ("name", "version", "to", "error", "message"),
    [
        ("clocks", 1, "champion", ArtifactError, "no registered model 'clocks'. did you mean 'clicks'?"),
        ("clicks", 9, "champion", ArtifactError, "model 'clicks' has no version 9. versions: 1, 2, 3, 4."),
        ("clicks", "champoin", "x", ArtifactError, "model 'clicks' has no alias 'champoin'. sluice promote clicks"),
        ("clicks", 1, "previous", ConfigError, "alias 'previous' is kept for what another meant before"),
        ("clicks", 1, "previous-shadow", ConfigError, "alias 'previous-shadow' is kept for what another meant"),
        ("clicks", 1, "v2", ConfigError, "'v2' can't be an alias"),
    ],
)
def test_what_is_not_there_is_named(
    uri: str, name: str, version: int | str, to: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        promote(name, version, to, tracking_uri=uri)
    assert message in str(caught.value)


def test_each_alias_goes_back_to_what_it_meant_itself(uri: str) -> None:
    for alias, versions in {"champion": (1, 2), "shadow": (3, 4)}.items():
        for version in versions:
            promote("clicks", version, alias, tracking_uri=uri)
    rollback("clicks", tracking_uri=uri)
    assert aliases(uri) == {"champion": 1, "previous": 2, "shadow": 4, "previous-shadow": 3}
    rollback("clicks", "shadow", tracking_uri=uri)
    assert aliases(uri) == {"champion": 1, "previous": 2, "shadow": 3, "previous-shadow": 4}


def test_a_promotion_broken_off_has_kept_the_former_champion(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    promote("clicks", 1, tracking_uri=uri)
    set_alias = promotion._set_alias

    def breaks(client: Any, name: str, alias: str, version: int) -> None:
        set_alias(client, name, alias, version)
        raise KeyboardInterrupt

    monkeypatch.setattr(promotion, "_set_alias", breaks)
    with pytest.raises(KeyboardInterrupt):
        promote("clicks", 2, tracking_uri=uri)
    assert aliases(uri) == {"champion": 1, "previous": 1}
