"""``sluice experiments``."""

from __future__ import annotations

import json
import re
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from typer.testing import CliRunner

from ctr_models.errors import ConfigError
from pipelines.cli import build_app
from pipelines.experiments.experiment import Experiment
from serving.database import MATCHES
from serving.experiments import Experiments


@pytest.fixture
def live(filled: Any) -> Any:
    rails = [{"metric": "ctr", "bound": 0.02}]
    tree = {"name": "gates", "control": "open", "arms": [{"name": "open"}, {"name": "gated"}]}
    Experiments(filled.database).put(Experiment.from_tree({**tree, "online": {"guardrails": rails}}))
    filled.traffic({"open": 0.2, "gated": 0.1}, 400, datetime.now(UTC) + timedelta(milliseconds=1))
    return filled


def test_results_check_pause_and_resume(live: Any, events_url: str) -> None:
    def run(*words: str) -> Any:
        return CliRunner().invoke(build_app(), ["experiments", *words, "--events", events_url])

    told = run("results", "gates", "--json", "-")
    assert told.exit_code == 0, told.output
    found = json.loads(told.stdout)
    assert [arm["units"] for arm in found["arms"]] == [400, 400]
    assert found["effects"][0]["verdict"] == "worse" and "guardrail of gated: broken" in told.stderr
    assert json.loads(run("results", "gates", "--interval", "fixed", "--json", "-").stdout)["interval"] == "fixed"
    assert "random order" not in told.stderr and "…" not in told.stderr  # 80 columns are enough
    one = {"experiment": "gates", "arm": "open", "unit": "open-0-0", "exposure_id": "open-0-0", "candidate": 0}
    live.database.insert([(MATCHES, {**one, "time": time.time_ns() // 1000, "shown": 20})])
    assert re.search(r"random order.*\nopen +1 +not enough yet", run("results", "gates").stdout)
    checked = run("check")
    assert checked.exit_code == 1 and "gates: arm gated is paused. guardrail: ctr -0." in checked.stderr
    assert run("check").exit_code == 0
    assert "gated is paused since" in run("results", "gates").stdout
    assert run("resume", "gates", "gated", "--reason", "mended").exit_code == 0
    assert run("pause", "gates", "gated", "--reason", "broken again").exit_code == 0
    assert "broken again" in run("results", "gates").stdout


def test_who_is_wrong_about_a_name_is_told_where_it_was_looked_for(live: Any, events_url: str) -> None:
    url = events_url.replace("://sluice@", "://sluice:secret@")
    name = url.replace("secret", "***")

    def told(*words: str) -> str:
        ran = CliRunner().invoke(build_app(), ["experiments", *words, "--events", url])
        assert isinstance(ran.exception, ConfigError)
        return str(ran.exception)

    unknown = f"{name}: no experiment 'gate'. did you mean 'gates'? known: 'gates'."
    assert told("results", "gate") == told("pause", "gate", "gated", "--reason", "none") == unknown
    arm = told("pause", "gates", "gaetd", "--reason", "none")
    assert (
        arm
        == f"{name}: experiment 'gates': no arm 'gaetd' that could be paused. did you mean 'gated'? known: 'gated'."
    )


@pytest.mark.parametrize(
    ("url", "reason"),
    [("postgresql://nobody@127.0.0.1:1/none", "refused"), ("sqlite:///nowhere.db", "there is no such file")],
)
def test_a_database_that_is_away_is_told(url: str, reason: str) -> None:
    told = CliRunner().invoke(build_app(), ["experiments", "check", "--events", url])
    assert told.exit_code != 0
    assert re.search(rf"the database can't be used \(.*{reason}\)\. give --events", str(told.exception))
