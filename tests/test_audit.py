"""The audit of dependencies tells what is known from what could not be asked."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

AUDIT = Path(__file__).parents[1] / "deploy" / "audit.py"
BAD = [{"id": "CVE-1", "fix_versions": ["2.0"]}]

# Stands in for pip-audit: it says what a table has for the service, the canary apart.
TOOL = """#!{python}
import json, sys
words = sys.argv[1:]
service, pins, out = (words[words.index(w) + 1] for w in ("-s", "-r", "-o"))
known = json.loads({table!r}).get(service)
if known is None:
    sys.exit("no such host")
lines = [line for line in open(pins).read().split() if "==" in line]
rows = []
for line in lines:
    name, version = line.split("==")
    rows.append({{"name": name, "version": version, **known.get(name, known["else"])}})
json.dump({{"dependencies": rows, "fixes": []}}, open(out, "w"))
sys.exit(any(row.get("vulns") for row in rows))
"""


def audit(folder: Path, table: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    tool = folder / "pip-audit"
    tool.write_text(TOOL.format(python=sys.executable, table=json.dumps(table)))
    tool.chmod(0o755)
    (folder / "pins.txt").write_text("good==1.0\nother==1.0\n")
    command = [sys.executable, str(AUDIT), str(tool), str(folder / "pins.txt")]
    return subprocess.run(command, capture_output=True, text=True)


CLEAN = {"jinja2": {"vulns": BAD}, "else": {"vulns": []}}
MIRROR = {"else": {"skip_reason": "not found"}}


@pytest.mark.parametrize(
    ("table", "code", "told"),
    [
        ({"pypi": CLEAN}, 0, "2 versions looked up (pypi), 0 with known"),
        ({"osv": CLEAN}, 0, "2 versions looked up (osv), 0 with known"),
        ({"pypi": MIRROR, "osv": CLEAN}, 0, "(osv)"),
        ({"pypi": {**CLEAN, "other": {"vulns": BAD}}}, 1, "other 1.0: CVE-1, fixed in 2.0"),
        ({"pypi": {**CLEAN, "other": {"skip_reason": "?"}}}, 0, "not known there: other"),
        ({"pypi": {"else": {"vulns": []}}}, 75, "not reached"),
        ({"pypi": MIRROR}, 75, "not reached"),
        ({}, 75, "not reached"),
    ],
)
def test_what_is_known_is_told(tmp_path: Path, table: dict[str, Any], code: int, told: str) -> None:
    done = audit(tmp_path, table)
    assert (done.returncode, done.stderr) == (code, "")
    assert told in done.stdout


def test_without_the_tool_nothing_is_known(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, str(AUDIT), str(tmp_path / "no")], capture_output=True, text=True)
    assert (done.returncode, done.stdout[:11]) == (75, "not reached")
