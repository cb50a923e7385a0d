"""The demo runs from end to end, leaves nothing running, and a second call takes what the first has finished."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

DEMO = [sys.executable, "-m", "pipelines.cli", "demo"]


def run(*words: str) -> tuple[dict, str]:
    done = subprocess.run([*DEMO, *words, "--json", "-"], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def test_the_demo(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    first, told = run("--out", str(out), "--rows", "4000")
    assert list(first["arms"]) == [
        "finalmlp, gate none",
        "finalmlp, gate sigmoid2",
        "gdcn, gate none",
        "gdcn, gate sigmoid",
    ]
    assert first["serving"]["largest_difference"] <= 1e-5
    assert first["truth"]["auc"] >= max(arm["test_auc"] for arm in first["arms"].values()) - 0.02
    assert {d["verdict"] for d in first["differences"]} <= {"better", "worse", "noise"}
    assert Path(first["report"]).read_text().startswith("<!doctype html>")
    assert told.strip().splitlines()[-1] == first["report"]
    assert "Traceback" not in told
    assert "WARNING" not in told
    again, _ = run("--out", str(out), "--rows", "4000")
    for key in ("arms", "truth", "differences", "champion"):
        assert again[key] == first[key], key


@pytest.mark.data
def test_the_demo_on_movielens(data_root: Path, tmp_path: Path) -> None:
    found, _ = run("--data", str(data_root / "movielens_100k"), "--out", str(tmp_path / "demo"))
    assert found["serving"]["largest_difference"] <= 1e-5
    assert found["truth"] == {}
