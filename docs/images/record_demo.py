"""Record what ``sluice demo`` prints as docs/images/demo.svg: python docs/images/record_demo.py [rows]."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from serving.walkthrough import Walkthrough


class _Screen(Console):
    """Keeps the folder of whoever records out of the picture."""

    def print(self, *objects: Any, **options: Any) -> None:
        here = str(Path.cwd())
        super().print(*(o.replace(here, "~/sluice") if isinstance(o, str) else o for o in objects), **options)


def main(rows: int | None = None) -> None:
    """Run the demo in runs/demo, as the command does, and keep the screen."""
    screen = _Screen(record=True, width=100, highlight=False)
    screen.print("$ make demo" if rows is None else f"$ sluice demo --rows {rows}", style="bold")
    Walkthrough(Path("runs/demo"), None, rows or 300_000, screen).run()
    svg = screen.export_svg(title="sluice")
    # Fonts come from the reader's machine, not from a server.
    svg = re.sub(r"@font-face \{.*?\}\n", "", svg, flags=re.DOTALL)
    Path(__file__).with_name("demo.svg").write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
