"""Asks the public databases of vulnerabilities for every pinned version: python deploy/audit.py <pip-audit> [pins].

Exit code 0: none is known. 1: some are, and they are listed. 75: no database could be asked, so nothing is known.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PINS = Path(__file__).with_name("constraints.txt")
SERVICES = ("pypi", "osv")
CANARY = "jinja2==2.4.1"
"""Has known vulnerabilities: a mirror of packages knows none of them, nor of any other, and says all is well."""
FOUND, NOT_REACHED = 1, 75


def ask(tool: str, service: str, pins: Path) -> list[dict[str, Any]] | None:
    """Return what a service knows of each pinned version; None if it can't be asked."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        command = [tool, "-r", str(pins), "-s", service, "--no-deps", "--disable-pip", "--progress-spinner", "off"]
        try:
            subprocess.run(
                [*command, "--timeout", "10", "-f", "json", "-o", str(out)], capture_output=True, timeout=300
            )
            found: list[dict[str, Any]] = json.loads(out.read_text())["dependencies"]
        except (OSError, ValueError, KeyError, subprocess.TimeoutExpired):
            return None
        return found


def main(tool: str, pins: Path = PINS) -> int:
    """Audit the pins by the first service that answers."""
    for service in SERVICES:
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
            print(CANARY, file=file, flush=True)
            canary = ask(tool, service, Path(file.name))
        if not canary or not canary[0].get("vulns"):
            continue
        found = ask(tool, service, pins)
        if found is None:
            continue
        skipped = [one["name"] for one in found if "skip_reason" in one]
        wrong = [one for one in found if one.get("vulns")]
        for one in wrong:
            for vulnerability in one["vulns"]:
                fixed = ", ".join(vulnerability.get("fix_versions", ())) or "no version"
                print(f"{one['name']} {one['version']}: {vulnerability['id']}, fixed in {fixed}")
        print(
            f"{len(found) - len(skipped)} versions looked up ({service}), {len(wrong)} with known vulnerabilities"
        )
        if skipped:
            print(f"not known there: {', '.join(skipped)}")
        return FOUND if wrong else 0
    print("not reached: no database of vulnerabilities could be asked; nothing is known of the pinned versions")
    return NOT_REACHED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], *map(Path, sys.argv[2:])))
