"""What deploys the server fits it: settings, ports, metrics. The files themselves are linted."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from serving.monitoring import Metrics
from serving.settings import PREFIX, Settings

DEPLOY = Path(__file__).parents[1] / "deploy"
KUBERNETES = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
FILES = [DEPLOY / "Containerfile", DEPLOY / "compose.yaml", *KUBERNETES]


def dashboard() -> str:
    return (DEPLOY / "grafana" / "sluice.json").read_text()


def lint(*words: str | Path) -> None:
    done = subprocess.run([Path(sys.executable).parent / words[0], *words[1:]], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_container_file_is_clean() -> None:
    lint("hadolint", DEPLOY / "Containerfile")


def test_the_composition_is_valid() -> None:
    lint("check-jsonschema", "--builtin-schema", "vendor.compose-spec", DEPLOY / "compose.yaml")


def test_the_manifests_are_valid() -> None:
    lint("kubernetes-validate", "--strict", *KUBERNETES)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_setting_exists(file) -> None:
    for name in re.findall(rf"\b{PREFIX}([A-Z_]+)", file.read_text()):
        assert name.lower() in Settings.model_fields


def test_every_copied_folder_exists() -> None:
    text = (DEPLOY / "Containerfile").read_text()
    for source in re.findall(r"^COPY (?!--from)(.+) \S+$", text, flags=re.M):
        assert all((DEPLOY.parent / part).exists() for part in source.split())


def test_every_mounted_file_of_ours_exists() -> None:
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    mounted = [v.split(":")[0] for s in services.values() for v in s.get("volumes", ()) if v.startswith("./")]
    made_by_hand = {"./keys.json", "./prometheus/key"}
    assert made_by_hand < set(mounted)
    assert all((DEPLOY / one).is_file() for one in set(mounted) - made_by_hand)


def test_every_metric_of_the_dashboard_exists() -> None:
    labels = {c._name: set(c._labelnames) for c in Metrics().registry._collector_to_names}
    seen = set()
    for panel in json.loads(dashboard())["panels"]:
        for target in panel["targets"]:
            for metric in re.findall(r"sluice_\w+", target["expr"]):
                family = re.sub(r"_(total|bucket|sum|count)$", "", metric)
                assert family in labels, metric
                seen.add(family)
                by = re.search(r"sum by \(([^)]*)\)", target["expr"])
                wanted = {w.strip() for w in by.group(1).split(",")} - {"le"} if by else set()
                assert wanted <= labels[family]
    assert len(seen) >= 9
