"""What deploys the server fits it: settings, ports, metrics. The files themselves are linted."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from serving.database import Database
from serving.events import EventStore
from serving.experiments import Experiments
from serving.guardrails import PausedArms
from serving.kept import Kept
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


def expressions() -> list[str]:
    rules = yaml.safe_load((DEPLOY / "prometheus" / "rules.yaml").read_text())
    panels = json.loads(dashboard())["panels"]
    found = [target["expr"] for panel in panels for target in panel["targets"]]
    return found + [rule["expr"] for group in rules["groups"] for rule in group["rules"]]


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """The labels of every metric that a server with all its parts shows."""
    folder = tmp_path_factory.mktemp("store")
    metrics = Metrics()
    database = Database(f"sqlite:///{folder}/events.db")
    with EventStore(database, folder / "spool") as store:
        metrics.watch_store(store)
        metrics.registry.register(PausedArms(Experiments(database)))
        metrics.registry.register(Kept(database))
        collectors = list(metrics.registry._collector_to_names)
        found = {
            family.name: set(getattr(family, "_labelnames", None) or getattr(one, "_labelnames", ()))
            for one in collectors
            for family in (one.describe() if hasattr(one, "describe") else one.collect())
        }
    return {**found, **{name: {"job", "instance"} for name in found if name.startswith("process_")}}


def test_every_metric_of_dashboard_and_rules_exists(labels: dict[str, set[str]]) -> None:
    seen = set()
    for expression in expressions():
        for metric, matchers in re.findall(r"((?:sluice|process)_\w+)(?:\{([^}]*)\})?", expression):
            family = metric if metric in labels else re.sub(r"_(total|bucket|sum|count)$", "", metric)
            assert family in labels, metric
            seen.add(family)
            wanted = set(re.findall(r"(\w+)=", matchers))
            for by in re.findall(r"by \(([^)]*)\)", expression):
                wanted |= {word.strip() for word in by.split(",")} - {"le"}
            assert wanted <= labels[family], expression
    unseen = {name for name in labels if name.startswith("sluice_")} - seen
    assert unseen == {"sluice_events_up", "sluice_events_waiting_rows"}


def test_panels_have_places_of_their_own() -> None:
    panels = json.loads(dashboard())["panels"]
    assert len({(p["gridPos"]["x"], p["gridPos"]["y"]) for p in panels}) == len(panels)
    assert len({p["id"] for p in panels}) == len(panels)


def test_the_rules_file_is_loaded() -> None:
    settings = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    volumes = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["prometheus"]["volumes"]
    (mounted,) = [v.split(":")[1] for v in volumes if v.startswith("./prometheus/rules.yaml:")]
    assert settings["rule_files"] == [mounted]
