"""``sluice models``, ``promote`` and ``score``, as a user and as a script meet them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from ctr_models.errors import ConfigError
from pipelines.cli import build_app
from pipelines.release.bundle import Bundle
from pipelines.release.example import example_bundle, example_log
from pipelines.release.registry import register
from pipelines.release.store import default_uri


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, str]:
    """A bundle, and a store that holds it twice: version 2 is worse."""
    folder = tmp_path_factory.mktemp("made")
    uri = default_uri(folder)
    good = example_bundle(folder / "good", test_auc=0.70, test_logloss=0.50)
    worse = example_bundle(folder / "worse", test_auc=0.65, test_logloss=0.55)
    register(good.directory, "clicks", uri, tags={"run": "monday"})
    register(worse.directory, "clicks", uri)
    return good, uri


def sluice(*words: str) -> Result:
    return CliRunner().invoke(build_app(), words, catch_exceptions=False)


def promoted(uri: str) -> dict[str, int]:
    found = json.loads(sluice("models", "clicks", "--tracking-uri", uri, "--json", "-").stdout)
    return {alias: release["version"] for release in found for alias in release["aliases"]}


def test_promotion_refusal_and_rollback(made: tuple[Bundle, str]) -> None:
    _, uri = made
    done = sluice("promote", "clicks", "--version", "1", "--tracking-uri", uri)
    assert done.exit_code == 0
    assert "clicks version 1 is now champion" in done.output
    refused = sluice("promote", "clicks", "--version", "2", "--max-auc-drop", "0.01", "--tracking-uri", uri)
    assert refused.exit_code == 1
    assert "refused: clicks version 2 is not made champion (was version 1)" in refused.output
    assert "test_auc 0.65000 is 0.05000 below version 1 (0.70000)" in refused.output
    assert promoted(uri) == {"champion": 1}
    dry = sluice("promote", "clicks", "--version", "2", "--dry-run", "--tracking-uri", uri, "--json", "-")
    assert json.loads(dry.stdout)["allowed"]
    assert promoted(uri) == {"champion": 1}
    assert sluice("promote", "clicks", "--version", "2", "--tracking-uri", uri).exit_code == 0
    assert promoted(uri) == {"champion": 2, "previous": 1}
    assert sluice("promote", "clicks", "--rollback", "--tracking-uri", uri).exit_code == 0
    assert promoted(uri) == {"champion": 1, "previous": 2}
    by_run = sluice("promote", "clicks", "--run", "monday", "--to", "checked", "--tracking-uri", uri)
    assert by_run.exit_code == 0
    assert promoted(uri)["checked"] == 1


@pytest.mark.parametrize("words", [[], ["--version", "1", "--rollback"], ["--version", "1", "--run", "monday"]])
def test_what_to_promote_is_said_in_one_way(made: tuple[Bundle, str], words: list[str]) -> None:
    with pytest.raises(ConfigError, match="give one of --version, --run and --rollback"):
        sluice("promote", "clicks", *words, "--tracking-uri", made[1])


def test_models_as_a_table_and_as_json(made: tuple[Bundle, str], tmp_path: Path) -> None:
    bundle, uri = made
    shown = sluice("models", "--tracking-uri", uri)
    assert "finalmlp" in shown.output
    assert "0.70000" in shown.output
    sluice("models", "--tracking-uri", uri, "--json", str(tmp_path / "models.json"))
    found = json.loads((tmp_path / "models.json").read_text())
    assert [r["uri"] for r in found] == ["models:/clicks/1", "models:/clicks/2"]
    assert found[0]["bundle_hash"] == bundle.hash
    assert found[0]["gates"] == bundle.gates
    empty = sluice("models", "--tracking-uri", default_uri(tmp_path))
    assert "no registered model yet" in empty.output


def test_scoring_a_file_prints_its_metrics(made: tuple[Bundle, str], tmp_path: Path) -> None:
    bundle, uri = made
    example_log(100, seed=9).write_parquet(tmp_path / "log.parquet")
    data, out = str(tmp_path / "log.parquet"), str(tmp_path / "scores.parquet")
    words = ["score", "-m", "models:/clicks/1", "--tracking-uri", uri, "--data", data, "--out", out]
    done = sluice(*words, "--json", "-")
    told = json.loads(done.stdout)
    assert (told["rows"], told["bundle"]) == (100, bundle.hash)
    assert 0 < told["metrics"]["auc"] < 1
    assert "auc 0." in sluice(*words).output
