"""``sluice materialize`` as a user calls it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import redis
from typer.testing import CliRunner, Result

from ctr_models.errors import ArtifactError, ConfigError
from pipelines.cli import build_app
from pipelines.datasets.base import open_data
from pipelines.datasets.click_world import ClickWorldOptions, write_world
from pipelines.datasets.config import DataConfig
from pipelines.features.redis_store import CURRENT
from pipelines.features.snapshot import Snapshot

OPTIONS = ["-o", "data.options.rows=4000", "-o", "data.options.users=80", "-o", "data.options.items=60"]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def sluice(*arguments: object) -> Result:
    words = ["materialize", *(str(a) for a in (*arguments, *OPTIONS))]
    return CliRunner().invoke(build_app(), words, catch_exceptions=False)


def test_a_snapshot_is_written_and_told_of() -> None:
    result = sluice("--out", "online", "--json", "result.json")
    report = json.loads(Path("result.json").read_text())
    assert f"{report['rows']['users']} users and {report['rows']['items']} items" in result.stdout
    options = {"rows": 4000, "users": 80, "items": 60}
    log = open_data(DataConfig(options=options)).parts["all"].frame.select("user_id", "item_id").collect()
    assert report["rows"] == {"users": log["user_id"].n_unique(), "items": log["item_id"].n_unique()}
    assert report["seconds"] > 0
    snapshot = Snapshot.open(Path("online"))
    assert snapshot.manifest["hash"] == report["hash"]
    assert None not in snapshot.find("users", [str(one) for one in log["user_id"].unique()])
    assert not list(Path("runs").glob(".materialize*"))


def test_the_moment_decides() -> None:
    result = sluice("--out", "online", "--at", "2026-01-03T00:00:00", "--json", "-")
    early = json.loads(result.stdout)
    assert early["at"] == "2026-01-03T00:00:00"
    late = json.loads(sluice("--out", "late", "--json", "-").stdout)
    assert early["stored"] == late["stored"]
    assert early["hash"] != late["hash"]
    with pytest.raises(ConfigError, match="'soon' is no time of this log"):
        sluice("--out", "online", "--at", "soon")


def test_a_redis_is_filled(redis_server: Any) -> None:
    report = json.loads(sluice("--redis", redis_server.url, "--json", "-").stdout)
    with redis.Redis.from_url(redis_server.url) as client:
        assert client.get(CURRENT) == report["version"].encode()
        assert client.dbsize() == 2 + sum(report["rows"].values())


def test_a_redis_that_is_not_there_is_told_of_before_the_log_is_read(redis_server: Any) -> None:
    redis_server.kill()
    with pytest.raises(ArtifactError, match=f"Redis 127.0.0.1:{redis_server.port}/0: answers no more"):
        sluice("--redis", redis_server.url, "-o", "data.source=parquet", "-o", "data.path=nowhere")


@pytest.mark.parametrize("targets", [[], ["--out", "online", "--redis", "redis://localhost:1"]])
def test_there_is_one_target(targets: list[str]) -> None:
    with pytest.raises(ConfigError, match="--out or --redis"):
        sluice(*targets)


def test_files_of_ones_own(tmp_path: Path) -> None:
    write_world(ClickWorldOptions(rows=2000, users=40, items=30, days=3), Path("world"))
    Path("ctr.yaml").write_text(
        "data: {source: parquet, path: world}\n"
        "features:\n"
        "  {label: click, user: user_id, item: item_id, timestamp: time, columns: [\n"
        "    {name: item_id, kind: categorical, role: item},\n"
        "    {name: price, kind: numeric, role: item},\n"
        "    {name: liked, kind: sequence, table: item_id, from_log: {column: item_id}}]}\n"
    )
    words = ["materialize", "-c", "ctr.yaml", "--out", "online", "--json", "-"]
    result = CliRunner().invoke(build_app(), words, catch_exceptions=False)
    stored = json.loads(result.stdout)["stored"]
    assert stored["user"]["columns"] == ["liked"]
    assert stored["item"]["columns"] == ["price"]
