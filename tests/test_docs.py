"""What the documents say is so: their code runs, their links lead somewhere, their commands exist."""

from __future__ import annotations

import ast
import doctest
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.core import TyperGroup

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def blocks(page: Path, language: str) -> list[str]:
    return [text for word, text in FENCE.findall(page.read_text(encoding="utf-8")) if word == language]


def names(pages: list[Path]) -> list[str]:
    return [str(page.relative_to(ROOT)) for page in pages]


WITH_PYTHON = [page for page in PAGES if blocks(page, "python")]
COMMANDS = [
    (page, line)
    for page in PAGES
    for text in blocks(page, "bash")
    for line in text.replace("\\\n", " ").splitlines()
    if line.startswith("sluice ")
]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=names(WITH_PYTHON))
def test_python_runs(page: Path) -> None:
    text = "\n".join(blocks(page, "python"))
    if ">>>" not in text:
        ast.parse(text)
        return
    test = doctest.DocTestParser().get_doctest(text, {"__name__": "docs"}, page.name, str(page), 0)
    result = doctest.DocTestRunner(optionflags=FLAGS).run(test)
    assert result.attempted
    assert result.failed == 0


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_links_lead_to_files(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in target:
            path = (page.parent / target.partition("#")[0]).resolve()
            assert path.exists(), f"{page.name} links to {target}"


@cache
def _root() -> Any:
    from pipelines.cli import build_app

    return typer.main.get_command(build_app())


def _find(words: list[str]) -> Any:
    """The innermost command that the words name."""
    command = _root()
    for word in words:
        if not isinstance(command, TyperGroup):
            break
        command = command.get_command(None, word)  # type: ignore[arg-type]
    return command


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=[line.partition("#")[0].strip() for _, line in COMMANDS])
def test_commands_and_their_options_exist(page: Path, line: str) -> None:
    words = shlex.split(re.split(r"[|<>]", line)[0], comments=True)[1:]
    command = _find(words)
    assert command is not None, f"{page.name}: no such command: {line}"
    stands_alone = not isinstance(command, TyperGroup) or command.invoke_without_command
    assert stands_alone, f"{page.name}: no such command: {line}"
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    used = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
    assert used <= known, f"{page.name}: {line}: {sorted(used - known)}"


def test_every_command_stands_in_a_document() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    missing = [name for name in _root().list_commands(None) if f"sluice {name}" not in text]
    assert not missing


def test_make_targets_of_the_readme_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    used = {
        t
        for page in PAGES
        for t in re.findall(r"(?:`|^)make ([a-z-]+)", page.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert {"demo", "test"} <= used <= targets


def test_the_configuration_page_is_current() -> None:
    # In a process of its own: here, examples may have registered gates.
    command = [sys.executable, "-m", "pipelines.cli", "config", "reference"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8") == done.stdout, "run make docs"


def test_the_gate_of_the_page_is_the_one_of_the_package() -> None:
    import ctr_models.gates

    (shown,) = blocks(ROOT / "docs" / "adding-a-gate.md", "python")
    parser = doctest.DocTestParser()
    code = [e.source for e in parser.get_examples(shown)]
    assert code == [e.source for e in parser.get_examples(ctr_models.gates.__doc__ or "")]
    gate = next(source for source in code if source.startswith("@register_gate"))
    assert len(gate.splitlines()) <= 10
