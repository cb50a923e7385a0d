"""What deploys the server fits it: settings, ports, metrics. The files themselves are linted."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from serving.database import Database
from serving.events import EventStore
from serving.experiments import Experiments
from serving.guardrails import PausedArms
from serving.kept import Kept
from serving.monitoring import Metrics
from serving.settings import PREFIX, Settings
from serving.workers import SPARE_SECONDS

DEPLOY = Path(__file__).parents[1] / "deploy"
KUBERNETES = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
ROOT = DEPLOY.parent
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


def test_every_setting_that_is_named_exists() -> None:
    named = {
        (file.name, name) for file in FILES for name in re.findall(rf"\b{PREFIX}([A-Z0-9_]+)", file.read_text())
    }
    assert {name for _, name in named} >= {"MODEL", "HOST", "KEYS", "EVENTS_URL"}
    assert [one for one in named if one[1].lower() not in Settings.model_fields] == []


def environment(kind: str) -> dict[str, str]:
    """What the image and the composition, or the manifest, set."""
    image = dict(re.findall(rf"({PREFIX}\w+)=(\S+)", (DEPLOY / "Containerfile").read_text()))
    if kind == "compose":
        return image | yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["sluice"]["environment"]
    (container,) = pod()["containers"]
    return image | {one["name"]: one.get("value", "postgresql://host/name") for one in container["env"]}


def pod() -> dict[str, Any]:
    (manifest,) = yaml.safe_load_all((DEPLOY / "kubernetes" / "deployment.yaml").read_text())
    found: dict[str, Any] = manifest["spec"]["template"]["spec"]
    return found


def mounted(kind: str) -> set[str]:
    """Folders that are mounted into the container."""
    if kind == "compose":
        service = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["sluice"]
        return {re.sub(r":ro$", "", one).rpartition(":")[2] for one in service["volumes"]} | set(service["tmpfs"])
    (container,) = pod()["containers"]
    return {one["mountPath"] for one in container["volumeMounts"]}


@pytest.mark.parametrize("kind", ["compose", "kubernetes"])
def test_the_settings_are_valid_and_what_changes_is_below_a_mount(kind: str) -> None:
    settings = Settings.from_env(environment(kind))
    (model,) = settings.slots.values()
    # A file or folder that is mounted itself stays the one that it was when another takes its name.
    for path in (Path(model), settings.keys, settings.events_spool):
        assert path is not None
        assert str(path) not in mounted(kind)
        assert {str(parent) for parent in path.parents} & mounted(kind)
    assert "/tmp" in mounted(kind)  # all else is read-only


def test_a_server_is_given_the_time_that_it_takes_to_drain() -> None:
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    given = {
        "compose": float(services["sluice"]["stop_grace_period"].removesuffix("s")),
        "kubernetes": pod()["terminationGracePeriodSeconds"],
    }
    for kind, seconds in given.items():
        settings = Settings.from_env(environment(kind))
        assert seconds > settings.drain_seconds + settings.grace_seconds + SPARE_SECONDS


def test_no_service_sets_the_settings_of_the_server() -> None:
    """For a service named sluice Kubernetes would put SLUICE_PORT=tcp://..., and more, into each container."""
    manifests = [one for file in KUBERNETES for one in yaml.safe_load_all(file.read_text())]
    services = [one["metadata"]["name"] for one in manifests if one["kind"] == "Service"]
    variables = [f"{name.upper().replace('-', '_')}_SERVICE_HOST" for name in services]
    assert any(variable.startswith(PREFIX) for variable in variables)
    assert pod()["enableServiceLinks"] is False


def test_the_image_is_of_this_version() -> None:
    (container,) = pod()["containers"]
    assert container["image"] == f"sluice:{project()['version']}"
    assert f" -t {container['image']} ." in (DEPLOY / "Containerfile").read_text()


def project() -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return found


def test_the_image_holds_the_extras_that_settings_ask_for() -> None:
    extras = project()["optional-dependencies"]
    (installed,) = re.findall(r"'\.\[(.+)\]'", (DEPLOY / "Containerfile").read_text())
    assert set(installed.split(",")) == set(extras) - {"cpu", "cuda", "test"}


def test_secrets_made_by_hand_are_not_committed() -> None:
    ignored = (ROOT / ".gitignore").read_text().split()
    assert {"/deploy/keys/", "/deploy/prometheus/key"} <= set(ignored)


def test_every_copied_folder_exists() -> None:
    text = (DEPLOY / "Containerfile").read_text()
    for source in re.findall(r"^COPY (?!--from)(.+) \S+$", text, flags=re.M):
        assert all((DEPLOY.parent / part).exists() for part in source.split())


def test_every_mounted_file_of_ours_exists() -> None:
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    sources = [v.split(":")[0] for s in services.values() for v in s.get("volumes", ()) if v.startswith("./")]
    made_by_hand = {"./keys", "./prometheus/key"}
    assert made_by_hand < set(sources)
    assert all((DEPLOY / one).is_file() for one in set(sources) - made_by_hand)


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
