from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipelines.commands.result import write_json


def test_what_is_undefined_is_null_in_a_file_and_on_the_screen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = {"auc": float("nan"), "folds": [0.5, (float("inf"),)], "out": tmp_path}
    expected = {"auc": None, "folds": [0.5, [None]], "out": str(tmp_path)}
    write_json(None, content)
    write_json(str(tmp_path / "sub" / "a.json"), content)
    assert capsys.readouterr().out == ""
    assert json.loads((tmp_path / "sub" / "a.json").read_text()) == expected
    write_json("-", content)
    assert json.loads(capsys.readouterr().out) == expected
