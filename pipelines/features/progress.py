"""What the user sees while rows pass by."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Step = Callable[[str, int | None], Callable[[int], None]]
"""Begins a step: its name, and its rows where they are known."""


@contextmanager
def steps(shown: bool) -> Iterator[Step]:
    """Yield a function that begins a step (a bar, a rate, the time left) and returns what is told of rows done.

    Args:
        shown: False draws nothing.

    Example:
        >>> with steps(False) as step:
        ...     done = step("reading", 100)
        ...     done(50)
    """
    if not shown:
        yield lambda name, total: lambda rows: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:>9}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("rows  {task.fields[rate]} rows/s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:

        def step(name: str, total: int | None) -> Callable[[int], None]:
            task = bar.add_task(name, total=total, rate="")

            def done(rows: int) -> None:
                bar.advance(task, rows)
                speed = bar.tasks[task].speed
                bar.update(task, rate=f"{speed:,.0f}" if speed else "")

            return done

        yield step
