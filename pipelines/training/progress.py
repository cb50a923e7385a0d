"""What the user sees while a model trains."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

REFRESH_SECONDS = 0.5


class Bar:
    """A progress bar over all steps, with rows/s and remaining time; a line an epoch.

    Args:
        shown: False counts but draws nothing.
        total: steps, if no epoch is saved by stopping.
        done: steps already made by an earlier run.
    """

    def __init__(self, shown: bool, total: int, done: int = 0) -> None:
        self._console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not shown,
            transient=True,
        )
        self._shown = shown
        self._task = self._progress.add_task("training", total=total, completed=done, rate="")
        self._rows = self._steps = 0
        self._last = time.perf_counter()

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def advance(self, rows: int) -> bool:
        """Count a step of ``rows`` rows; return whether the bar was drawn anew, about twice a second."""
        self._rows += rows
        self._steps += 1
        now = time.perf_counter()
        if now - self._last < REFRESH_SECONDS:
            return False
        rate = f"{self._rows / (now - self._last):,.0f} rows/s"
        self._progress.update(self._task, advance=self._steps, description="training", rate=rate)
        self._rows = self._steps = 0
        self._last = now
        return True

    def say(self, description: str) -> None:
        """Show what goes on besides training."""
        self._progress.update(self._task, advance=self._steps, description=description)
        self._rows = self._steps = 0

    def epoch(self, record: dict[str, Any]) -> None:
        """Print an epoch's figures above the bar."""
        self._last = time.perf_counter()
        if self._shown:
            star = " [green]best[/green]" if record["best"] else ""
            shown = ("auc", "logloss") if "valid_auc" in record else ("hr_10", "ndcg_10")
            told = "  ".join(f"{name} {record[f'valid_{name}']:.5f}" for name in shown)
            self._console.print(
                f"    epoch {record['epoch']:>2}  loss {record['train_loss']:.5f}  "
                f"valid {told}  "
                f"lr {record['lr']:.1e}  {record['rows_per_second']:,.0f} rows/s{star}",
                highlight=False,
                soft_wrap=True,
            )
