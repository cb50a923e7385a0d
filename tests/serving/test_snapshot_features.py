"""A snapshot is taken into use once it is whole; a damaged one is refused, and the one before stays."""

from __future__ import annotations

import logging
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.features.snapshot import MANIFEST, write_snapshot
from pipelines.release.bundle import Bundle
from serving import snapshot_features
from tests.serving.stored_log import (
    LOG,
    ask,
    expected,
    materialized,
    problem,
)
from tests.serving.waiting import until


def test_a_snapshot_is_replaced_while_it_is_used(serve: Any, stored_bundle: Bundle, tmp_path: Path) -> None:
    versions = [materialized(LOG, at) for at in (10, 20, 30)]
    hashes = {write_snapshot(f, tmp_path / f"made{i}")["hash"][:12]: f for i, f in enumerate(versions)}
    write_snapshot(versions[0], tmp_path / "online")
    client = serve(tmp_path / "online")
    seen: list[str] = []
    for features in (*versions, versions[0]):
        wanted = write_snapshot(features, tmp_path / "online")["hash"][:12]
        end = time.monotonic() + 30
        while not seen or seen[-1] != wanted:
            assert time.monotonic() < end
            reply = ask(client)
            seen.append(reply["features"]["version"])
            np.testing.assert_allclose(reply["scores"], expected(stored_bundle, hashes[seen[-1]]), atol=1e-6)
    assert set(seen) == set(hashes)


def test_a_damaged_snapshot_is_refused_by_name_and_the_old_one_stays(
    serve: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = write_snapshot(materialized(LOG, 10), tmp_path / "online")["hash"][:12]
    client = serve(tmp_path / "online")
    write_snapshot(materialized(LOG, 20), tmp_path / "next")
    content = bytearray((tmp_path / "next" / "items.arrow").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "next" / "items.arrow").write_bytes(content)
    with caplog.at_level(logging.ERROR, "sluice.features"):
        shutil.rmtree(tmp_path / "online")
        (tmp_path / "next").rename(tmp_path / "online")
        until(lambda: "items.arrow" in problem(client))
        time.sleep(0.2)
    assert ask(client)["features"]["version"] == good
    assert len([r for r in caplog.records if "items.arrow" in r.getMessage()]) == 1  # however often it is looked at
    better = write_snapshot(materialized(LOG, 30), tmp_path / "online")["hash"][:12]
    until(lambda: ask(client)["features"]["version"] == better)
    assert problem(client) == ""


def test_a_half_copied_snapshot_is_tried_again(serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot_features, "REFUSED_SECONDS", 0.05)
    write_snapshot(materialized(LOG), tmp_path / "made")
    (tmp_path / "online").mkdir()
    shutil.copy2(tmp_path / "made" / MANIFEST, tmp_path / "online" / MANIFEST)
    client = serve(tmp_path / "online")
    assert "users.arrow" in problem(client)
    for name in ("users.arrow", "items.arrow"):
        shutil.copy2(tmp_path / "made" / name, tmp_path / "online" / name)
    until(lambda: problem(client) == "")


def test_no_snapshot_yet_fails_no_request(serve: Any, tmp_path: Path) -> None:
    client = serve(tmp_path / "online")
    reply = ask(client)
    assert reply["features"] == {
        "available": False,
        "version": None,
        "missing": {"user": True, "items": [10, 77, 12]},
    }
    assert "no snapshot of features here" in problem(client)
    assert "sluice_features_up 0.0" in client.get("/metrics").text
    write_snapshot(materialized(LOG), tmp_path / "online")
    until(lambda: ask(client)["features"]["available"])
