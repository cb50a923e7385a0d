from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SHARED = 227 * 1024
"""Bytes of shared memory that a block of threads can have on an H100."""


def test_every_kernel_compiles_for_an_h100(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.kernels.gpu_compiler"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {one["kernel"] for one in found} == {
        name for path in ROOT.glob("kernels/*.py") for name in launched(path)
    }
    for one in found:
        assert one["shared"] <= SHARED, one
        assert one["stack"] <= 256, one


def launched(path: Path) -> list[str]:
    """Return the names of a file's kernels, which are launched as ``_kernel[grid](…)``."""
    return [f"kernels.{path.stem}.{name}" for name in re.findall(r"^ +(_\w+)\[.+\]\(", path.read_text(), re.M)]
