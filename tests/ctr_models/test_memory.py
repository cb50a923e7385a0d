from __future__ import annotations

import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import numpy as np
from ctr_models.memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
use = lambda: [np.ones(1 << 20) for _ in range(20)]
for _ in range(3):
    use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_freed_memory_is_used_again():
    """What the next step allocates was not given back to the system, to be cleared again page by page."""
    faults = {
        how: int(subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, check=True).stdout)
        for how in ("keep", "usual")
    }
    assert faults["keep"] < 100 < faults["usual"]
