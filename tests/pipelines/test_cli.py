"""What a script sees of a failure."""

from __future__ import annotations

import errno
import importlib.util
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from ctr_models.errors import DataError
from pipelines import cli


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (DataError("no rows", where="log.csv"), 2, "error: log.csv: no rows"),
        (
            PermissionError(errno.EACCES, "Permission denied", "out"),
            2,
            "error: out: can't be used (Permission denied).",
        ),
        (FileNotFoundError(errno.ENOENT, "No such file", "own"), 3, "FileNotFoundError"),
        (RuntimeError("a bug"), 3, "RuntimeError: a bug"),
        (typer.Exit(1), 1, ""),
    ],
)
def test_exit_codes_tell_a_missed_bar_from_a_mistake_and_from_a_bug(
    error: Exception, code: int, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    app = typer.Typer()

    @app.command()
    def fail() -> None:
        raise error

    monkeypatch.setattr("sys.argv", ["sluice"])
    monkeypatch.setattr(cli, "build_app", lambda: app)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == code
    assert told in capsys.readouterr().err


def test_the_version_and_the_commands_along_the_road() -> None:
    shown = CliRunner().invoke(cli.build_app(), ["--version"])
    assert (shown.exit_code, shown.stdout) == (0, f"sluice {version('sluice')}\n")
    commands = typer.main.get_command(cli.build_app()).list_commands(None)  # type: ignore[attr-defined]
    assert commands[: len(cli._ROAD)] == list(cli._ROAD)


TAKING = ("compare", "config check", "features", "materialize", "train", "bench gates --data frappe")
"""Commands that take overrides."""


def _commands(command: Any, *words: str) -> Iterator[tuple[str, Any]]:
    yield " ".join(words), command
    for name, one in getattr(command, "commands", {}).items():
        yield from _commands(one, *words, name)


def test_no_command_that_takes_overrides_is_left_out_below() -> None:
    every = _commands(typer.main.get_command(cli.build_app()))
    assert {name for name, one in every if any(p.name == "override" for p in one.params)} == set(TAKING[:-1])


@pytest.mark.parametrize("command", TAKING)
def test_an_override_without_its_option_is_told_how_to_give_it(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["sluice", *command.split(), "-o", "seed=1", "train.epochs=6"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    told = "error: train.epochs=6: an override stands alone. give it with -o.\n"
    assert (caught.value.code, capsys.readouterr().err) == (2, told)


@pytest.mark.parametrize(
    "words", [["train", "epochs"], ["keys", "list", "keys.json", "a=1"], ["train", "--epochs=6"]]
)
def test_other_words_that_nobody_asked_for_are_told_as_ever(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["sluice", *words])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    assert "Usage" in capsys.readouterr().err


def test_modules_of_the_folder_where_one_works_are_found_but_hide_no_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    app = typer.Typer()

    @app.command()
    def find() -> None:
        for name in ("gates_of_mine", "this"):
            (tmp_path / f"{name}.py").write_text("")
        found = importlib.util.find_spec("gates_of_mine")
        assert found is not None and found.origin == str(tmp_path / "gates_of_mine.py")
        standard = importlib.util.find_spec("this")  # a module that nothing imports
        assert standard is not None and standard.origin != str(tmp_path / "this.py")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    monkeypatch.setattr("sys.argv", ["sluice"])
    monkeypatch.setattr(cli, "build_app", lambda: app)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 0
