"""The distribution: pins that agree, entry points that load, a command that starts fast."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = {
    canonicalize_name(name): pin
    for name, pin in re.findall(r"^([A-Za-z0-9._-]+)==(\S+)$", (ROOT / "deploy/constraints.txt").read_text(), re.M)
}
GROUPS = [group for group in PROJECT["entry-points"] if group.startswith("sluice.")]


@pytest.mark.parametrize("file", ["deploy/constraints.txt", "deploy/airflow/constraints.txt"])
def test_constraints_are_plain_pins(file: str) -> None:
    lines = [line for line in (ROOT / file).read_text().splitlines() if line and not line.startswith("#")]
    assert len(lines) > 50
    for line in lines:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.!]*", line), line


@pytest.mark.parametrize("text", [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["test"]])
def test_every_requirement_is_pinned_within_its_bounds(text: str) -> None:
    requirement = Requirement(text)
    assert requirement.specifier.contains(PINS[canonicalize_name(requirement.name)])


def test_the_shim_has_the_version_that_the_cuda_extra_asks_for() -> None:
    shim = tomllib.loads((ROOT / "deploy/shim/fbgemm-gpu/pyproject.toml").read_text())["project"]
    assert f"fbgemm-gpu=={shim['version']}" in PROJECT["optional-dependencies"]["cuda"]
    assert set(shim["dependencies"]) <= set(PROJECT["optional-dependencies"]["cpu"])


@pytest.mark.parametrize("group", GROUPS)
def test_entry_points_load(group: str) -> None:
    ours = {point.name: point for point in entry_points(group=group) if point.dist and point.dist.name == "sluice"}
    assert set(ours) == set(PROJECT["entry-points"][group]), "the metadata are old: install again"
    for point in ours.values():
        point.load()


def test_the_command_line_starts_without_the_heavy_libraries() -> None:
    code = (
        "import sys; from pipelines.cli import build_app; build_app(); "
        "print(*sorted({'torch', 'torchrec', 'mlflow', 'polars', 'matplotlib', 'fastapi'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_a_users_error_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    (tmp_path / "ctr.yaml").write_text("train: {epoch: 3}")
    command = [sys.executable, "-m", "pipelines.cli", "config", "check", "-c", "ctr.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: ctr.yaml: train.epoch: unknown key. did you mean 'epochs'?")


def test_the_version_is_the_projects() -> None:
    assert version("sluice") == PROJECT["version"]


def test_no_python_that_suits_is_told_what_to_do(tmp_path: Path) -> None:
    command = ["bash", str(ROOT / "deploy" / "make-venv"), str(tmp_path / "venv")]
    done = subprocess.run(
        command, env={"PATH": "/usr/bin:/bin", "PYTHON": "/no/python3.11"}, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr == "error: /no/python3.11 is not a Python 3.11 or 3.12 that can make virtual environments.\n"
    assert not (tmp_path / "venv").exists()


def test_a_python_that_suits_makes_the_environment_once(tmp_path: Path) -> None:
    command = ["bash", str(ROOT / "deploy" / "make-venv"), str(tmp_path / "venv")]
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": sys.executable}
    first = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert first.stdout.startswith(f"Making {tmp_path}/venv with Python 3.1")
    assert subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout == ""
