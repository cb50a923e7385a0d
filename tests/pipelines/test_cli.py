"""What a script sees of a failure."""

from __future__ import annotations

import pytest
import typer

from ctr_models.errors import DataError
from pipelines import cli


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (DataError("no rows", where="log.csv"), 2, "error: log.csv: no rows"),
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
