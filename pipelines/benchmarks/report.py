"""What every benchmark ends with: a table, the figures as JSON, and the bars that were asked for."""

from __future__ import annotations

import json
import math
import platform
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ctr_models.errors import ConfigError, nearest
from pipelines.commands.result import writable


def _checked(option: typer.CallbackParam, bars: list[str] | None) -> list[str] | None:
    """Refuse what is no bar before anything is measured; :func:`known` refuses those for no figure."""
    for text in bars or ():
        _bar(text, option.opts[0])
    return bars


JsonPath = Annotated[
    Path | None, typer.Option("--json", callback=writable, help="Write the figures here; - prints them.")
]
AtLeast = Annotated[
    list[str] | None,
    typer.Option("--at-least", callback=_checked, help="key=value, repeatable: exit 1 if the figure is smaller."),
]
AtMost = Annotated[
    list[str] | None,
    typer.Option("--at-most", callback=_checked, help="key=value, repeatable: exit 1 if the figure is larger."),
]


class BenchReport:
    """Rows for the reader, figures for the bars.

    Args:
        title: heads the table.
        columns: the table's columns.

    Example:
        >>> report = BenchReport("sorting", ["rows", "rows/s"])
        >>> report.row(1000, 52_000.0)
        >>> report.figures["rows_per_second"] = 52_000.0
        >>> report.missed(at_least=["rows_per_second=60000"])
        ['rows_per_second is 52000, at least 60000 was asked for']
    """

    def __init__(self, title: str, columns: Sequence[str]) -> None:
        self.title, self.columns = title, list(columns)
        self.rows: list[tuple[str, ...]] = []
        self.figures: dict[str, float] = {}
        self.notes: list[str] = []

    def row(self, *cells: object) -> None:
        """Add a row; numbers are shown with four significant digits."""
        self.rows.append(tuple(_shown(cell) for cell in cells))

    def note(self, text: str) -> None:
        """Add a line below the table: what was held fixed, what to keep in mind."""
        self.notes.append(text)

    def missed(self, at_least: Sequence[str] | None = None, at_most: Sequence[str] | None = None) -> list[str]:
        """Return one sentence for each bar that a figure misses.

        Args:
            at_least: ``key=value`` texts.
            at_most: ``key=value`` texts.

        Raises:
            ConfigError: a bar is not ``key=number`` or names no figure.
        """
        known(self.figures, at_least, at_most)
        sentences = []
        for bars, word, holds in (
            (at_least, "least", lambda figure, bar: figure >= bar),
            (at_most, "most", lambda figure, bar: figure <= bar),
        ):
            for text in bars or ():
                key, bar = _bar(text, f"--at-{word}")
                figure = self.figures[key]
                if not holds(figure, bar):  # nan misses every bar
                    sentences.append(f"{key} is {figure:.6g}, at {word} {bar:.6g} was asked for")
        return sentences

    def finish(
        self,
        json_path: Path | None = None,
        at_least: Sequence[str] | None = None,
        at_most: Sequence[str] | None = None,
    ) -> None:
        """Print the table, write the JSON, hold the figures against the bars.

        Args:
            json_path: where the figures go; ``-`` is the standard output, and then the table goes to stderr.
            at_least: bars below which no figure may fall, as ``key=value``.
            at_most: bars above which no figure may rise.

        Raises:
            typer.Exit: with code 1 when a bar is missed, each named on stderr.
        """
        to_stdout = json_path is not None and str(json_path) == "-"
        console = Console(stderr=to_stdout)
        if not console.is_terminal:
            console.width = max(console.width, 140)  # a log has no edge, and a figure cut short is no figure
        table = Table(title=self.title, title_justify="left")
        for position, column in enumerate(self.columns):
            table.add_column(column, justify="left" if position == 0 else "right")
        for row in self.rows:
            table.add_row(*row)
        console.print(table)
        for note in self.notes:
            console.print(note, style="dim", highlight=False)
        content = json.dumps(self.to_dict(), indent=2)
        if to_stdout:
            print(content)
        elif json_path is not None:
            from pipelines.features.files import atomic_write

            atomic_write(json_path, content + "\n")
        sentences = self.missed(at_least, at_most)
        for sentence in sentences:
            Console(stderr=True).print(f"missed: {sentence}", style="bold red", highlight=False, soft_wrap=True)
        if sentences:
            raise typer.Exit(1)

    def to_dict(self) -> dict[str, Any]:
        """Return figures, table and machine, as the JSON holds them; a figure that is not finite is null."""
        return {
            "title": self.title,
            "figures": {k: v if math.isfinite(v) else None for k, v in self.figures.items()},
            "columns": self.columns,
            "rows": [list(row) for row in self.rows],
            "notes": self.notes,
            "machine": {
                "python": platform.python_version(),
                "processor": platform.processor() or platform.machine(),
                "system": sys.platform,
            },
        }


def known(
    figures: Iterable[str], at_least: Sequence[str] | None = None, at_most: Sequence[str] | None = None
) -> None:
    """Refuse bars for figures that there are not; before anything is measured, if it is known what there will be.

    Args:
        figures: their names.
        at_least: bars, as ``key=value``.
        at_most: bars, as ``key=value``.

    Raises:
        ConfigError: a bar names none of them; with the nearest.

    Example:
        >>> known(["ratio_copy", "peak_mb"], at_least=["ratio_coy=0.4"])
        Traceback (most recent call last):
            ...
        ctr_models.errors.ConfigError: --at-least: no figure 'ratio_coy'. did you mean 'ratio_copy'? ...
    """
    names = set(figures)
    for bars, option in ((at_least, "--at-least"), (at_most, "--at-most")):
        for text in bars or ():
            key, _ = _bar(text, option)
            if key not in names:
                raise ConfigError(f"no figure {key!r}", where=option, remedy=nearest(key, names))


def _bar(text: str, option: str) -> tuple[str, float]:
    key, sign, value = text.partition("=")
    try:
        bar = float(value)
    except ValueError:
        sign = ""
    if not sign:
        raise ConfigError("a bar is written key=number", where=f"{option} {text!r}")
    return key, bar


@contextmanager
def progress(talk: Console, steps: int) -> Iterator[Callable[[str], None]]:
    """Show how many steps are done, which one runs, and the time that is left; gone at the end.

    Args:
        talk: where; nothing is shown unless it is a terminal.
        steps: how many there will be.

    Yields:
        What is to be called as each step begins, with its name.

    Example:
        >>> with progress(Console(stderr=True), 2) as step:
        ...     for name in ("first", "second"):
        ...         step(name)
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # Steps may take minutes: the estimate goes by all of them, not by those of the last half minute.
    with Progress(*columns, console=talk, transient=True, speed_estimate_period=86400) as bar:
        task = bar.add_task("", total=steps)
        begun = 0

        def step(what: str) -> None:
            nonlocal begun
            bar.update(task, description=what, completed=begun)
            begun += 1

        yield step


def _shown(cell: object) -> str:
    if isinstance(cell, bool) or not isinstance(cell, float | int):
        return str(cell)
    if math.isnan(cell):
        return ""
    if isinstance(cell, int) or abs(cell) >= 1000:
        return f"{cell:,.0f}"
    return f"{cell:.4g}"
