"""What the documents and the help say is so: code runs, links lead somewhere, commands and settings exist."""

from __future__ import annotations

import ast
import doctest
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.core import TyperGroup
from typer.testing import CliRunner

from pipelines.cli import build_app
from pipelines.config import load_config, parse_config
from pipelines.datasets.base import check_options
from pipelines.training.recipes import make_recipe
from serving.settings import Settings

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def blocks(page: Path, language: str) -> list[str]:
    return [text for word, text in FENCE.findall(page.read_text(encoding="utf-8")) if word == language]


def names(pages: list[Path]) -> list[str]:
    return [str(page.relative_to(ROOT)) for page in pages]


WITH_PYTHON = [page for page in PAGES if blocks(page, "python")]
TO_RUN = [
    (page, line)
    for page in PAGES
    for text in (*blocks(page, "bash"), *blocks(page, "shell"))
    for line in text.replace("\\\n", " ").splitlines()
    if line.startswith("sluice ")
]
NAMED = [
    (page, " ".join(line.split()))
    for page in PAGES
    for line in re.findall(r"`(sluice\s[^`]*)`", FENCE.sub("", page.read_text(encoding="utf-8")))
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
            file, _, place = target.partition("#")
            path = (page.parent / file).resolve() if file else page
            assert path.exists(), f"{page.name} links to {target}"
            assert not place or place in _places(path), f"{page.name} links to {target}"


def _places(page: Path) -> set[str]:
    """What may stand behind # in a link to a page."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@cache
def _root() -> Any:
    return typer.main.get_command(build_app())


def _find(words: list[str]) -> Any:
    """The innermost command that the words name."""
    command = _root()
    for word in words:
        if not isinstance(command, TyperGroup) or word.startswith("-"):
            break
        command = command.get_command(None, word)  # type: ignore[arg-type]
    return command


def _check(line: str) -> Any:
    """Assert that a command line names a command and options that it has; return the command."""
    words = shlex.split(re.split(r"[|<>]", re.sub(r"<[^>]*>", "X", line))[0], comments=True)[1:]
    command = _find(words)
    assert command is not None, f"no such command: {line}"
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    used = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
    assert used <= known, f"{line}: {sorted(used - known)}"
    return command


@pytest.mark.parametrize(
    ("page", "line"), TO_RUN, ids=[f"{page.stem}: {line.partition('#')[0].strip()}" for page, line in TO_RUN]
)
def test_commands_to_run_exist_with_their_options(page: Path, line: str) -> None:
    command = _check(line)
    assert not isinstance(command, TyperGroup) or command.invoke_without_command, f"does nothing: {line}"


OVERRIDDEN = [(page, line) for page, line in TO_RUN if " -o " in line and " bench " not in line]


@pytest.mark.parametrize(("page", "line"), OVERRIDDEN, ids=[f"{page.stem}: {line}" for page, line in OVERRIDDEN])
def test_overrides_are_valid(page: Path, line: str) -> None:
    given = list(pairwise(shlex.split(line, comments=True)))
    file = ROOT / dict(given).get("-c", "ctr.yaml")
    overrides = [value for option, value in given if option == "-o"]
    check_options(load_config(file if file.is_file() else None, overrides).data)


@pytest.mark.parametrize(("page", "line"), NAMED, ids=[f"{page.stem}: {line}" for page, line in NAMED])
def test_commands_that_are_named_exist_with_their_options(page: Path, line: str) -> None:
    _check(line)


def _commands(command: Any, name: str = "sluice") -> Iterator[tuple[str, Any]]:
    if isinstance(command, TyperGroup):
        for word in command.list_commands(None):  # type: ignore[arg-type]
            yield from _commands(command.get_command(None, word), f"{name} {word}")  # type: ignore[arg-type]
        if not command.invoke_without_command:
            return
    yield name, command


@pytest.mark.parametrize(("name", "command"), list(_commands(_root())), ids=lambda value: str(value))
def test_the_help_of_a_command_is_whole(name: str, command: Any) -> None:
    first, *more = (command.help or "").splitlines()
    assert first, "nothing says what it does"
    examples = re.findall(r"^(?:Example: )?(sluice .*)$", "\n".join([*more, command.epilog or ""]), re.MULTILINE)
    assert any(example.startswith(name) for example in examples), "no example"
    for example in examples:
        _check(example)
    bare = [option.opts[0] for option in command.params if option.param_type_name == "option" and not option.help]
    assert not bare, "options that nothing is said of"
    for text in (command.help, command.epilog, *(getattr(option, "help", None) for option in command.params)):
        assert not re.search(r"\[[a-z]", text or ""), f"Rich takes [text] for markup and hides it: {text}"


def test_every_command_stands_in_a_document() -> None:
    text = " ".join(" ".join(page.read_text(encoding="utf-8").split()) for page in PAGES)
    missing = [name for name, _ in _commands(_root()) if name not in text]
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


def test_the_page_of_the_servers_settings_is_current() -> None:
    shown = CliRunner().invoke(build_app(), ["serve", "--settings"])
    assert shown.exit_code == 0
    assert (ROOT / "docs" / "server-settings.md").read_text(encoding="utf-8") == shown.stdout, "run make docs"


def test_the_help_of_serve_names_the_defaults_of_the_settings() -> None:
    shown = {option.name: option.show_default for option in _find(["serve"]).params}
    defaults = {name: field.default for name, field in Settings.model_fields.items() if name in shown}
    told = {name: str(value) for name, value in defaults.items() if isinstance(value, int | str)}
    assert {"host", "port", "workers", "threads", "max_candidates"} <= set(told)
    assert told == {name: shown[name] for name in told}


def test_settings_that_the_pages_name_exist() -> None:
    for page in PAGES:
        named = set(re.findall(r"\bSLUICE_([A-Z0-9_]+)", page.read_text(encoding="utf-8")))
        assert {name.lower() for name in named} <= set(Settings.model_fields), page.name


def test_metrics_that_the_pages_name_exist() -> None:
    code = "\n".join(file.read_text(encoding="utf-8") for file in (ROOT / "serving").glob("*.py"))
    known = {name.removesuffix("_total") for name in re.findall(r"\bsluice_[a-z_]+", code)}
    for page in PAGES:
        named = re.findall(r"`(sluice_[a-z_]*[a-z])[`{]", page.read_text(encoding="utf-8"))
        assert {name.removesuffix("_total") for name in named} <= {*known, "sluice_day"}, page.name


YAML = [(page, text) for page in PAGES for text in blocks(page, "yaml")]


@pytest.mark.parametrize(("page", "text"), YAML, ids=[page.stem for page, _ in YAML])
def test_configurations_are_valid(page: Path, text: str) -> None:
    config = parse_config(yaml.safe_load(text) or {}, page.name)
    check_options(config.data)
    make_recipe(config.recipe)


def test_the_gate_of_the_page_is_the_one_of_the_package() -> None:
    import ctr_models.gates

    (shown,) = blocks(ROOT / "docs" / "adding-a-gate.md", "python")
    parser = doctest.DocTestParser()
    code = [e.source for e in parser.get_examples(shown)]
    assert code == [e.source for e in parser.get_examples(ctr_models.gates.__doc__ or "")]
    gate = next(source for source in code if source.startswith("@register_gate"))
    assert len(gate.splitlines()) <= 10
