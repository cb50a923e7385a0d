"""Settings come from the environment or the command line, and a wrong one is named."""

from __future__ import annotations

import pytest

from ctr_models.errors import ConfigError
from serving import EMBEDDED
from serving.settings import Settings


def test_the_command_line_wins_over_the_environment() -> None:
    environment = {"SLUICE_MODEL": "a", "SLUICE_PORT": "9000", "HOME": "/"}
    settings = Settings.from_env(environment, model="b", port=None, host="::1")
    assert (settings.model, settings.port, settings.host) == (("b",), 9000, "::1")


def test_several_models_have_a_slot_each() -> None:
    text = "main=models:/clicks@champion, models:/clocks/3,runs/old/bundle,next=/srv/a=b/c"
    slots = Settings.from_env({"SLUICE_MODEL": text}).slots
    assert slots == {
        "main": "models:/clicks@champion",
        "clocks": "models:/clocks/3",
        "bundle": "runs/old/bundle",
        "next": "/srv/a=b/c",
    }
    assert next(iter(slots)) == "main"
    assert Settings.from_env({}, model=["a,b", "x=c"]).slots == {"a,b": "a,b", "x": "c"}


def test_a_deployment_keeps_events_unless_told_otherwise() -> None:
    assert Settings.from_env({"SLUICE_MODEL": "a"}).events_url == EMBEDDED == "sqlite:///runs/events.db"
    assert Settings.from_env({"SLUICE_MODEL": "a", "SLUICE_EVENTS_URL": "none"}).events_url is None
    assert Settings.from_env({"SLUICE_MODEL": "a"}, events_url="none").events_url is None
    assert Settings.from_env({"SLUICE_MODEL": "a", "SLUICE_EVENTS_URL": "none"}, events_url="x").events_url == "x"
    off = Settings.from_env({"SLUICE_MODEL": "a"}, events_url="none")
    assert Settings.model_validate(off.model_dump(mode="json")) == off  # as workers are told
    assert Settings(model=("a",)).events_url is None  # an application in another program writes nothing unasked


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, "no model to serve. give --model models:/name@champion, or set SLUICE_MODEL."),
        ({"SLUICE_MODEL": "a", "SLUICE_PROT": "1"}, "SLUICE_PROT: no such setting. did you mean 'SLUICE_PORT'?"),
        ({"SLUICE_MODEL": "a=x,a=y"}, "server settings: two models have one slot's name; write slot=model"),
        ({"SLUICE_MODEL": "a", "SLUICE_PORT": "x"}, "server settings: port: "),
        (
            {"SLUICE_MODEL": "a", "SLUICE_PORT": "70000"},
            "server settings: port: must be at most 65535, got '70000'",
        ),
        ({"SLUICE_MODEL": "a", "SLUICE_WORKERS": "0"}, "server settings: workers: must be at least 1, got '0'"),
    ],
)
def test_wrong_settings_are_named(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Settings.from_env(environment)
    assert str(caught.value).startswith(message)
