"""Compiles every Triton kernel for an H100 on a machine without one, as a launch would; prints what each needs.

Triton's interpreter runs kernels as Python: it knows no types of loops and branches, no registers and no shared
memory. Run it as a program of its own, since a process is either interpreted or compiled.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from kernels import OPERATORS
from kernels.cross_network import NARROW
from tests.kernels.conformance import SIZES, variants

LARGE = [
    ("activated_linear", torch.float32, {"rows": 40, "size": 80, "outputs": 40}),
    *(("cross_network", dtype, {"rows": 64, "width": width, "layers": 3}) for dtype, width in NARROW.items()),
]
"""Whose tiles are larger than those of small examples: DIN's second layer, and the widest rows held whole."""


class _H100:
    """Stands in for the driver of a GPU of compute capability 9.0."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def main() -> None:
    """Call every operator's implementation, forward and backward, with launches that compile and do not run."""
    found: list[dict[str, Any]] = []
    driver.set_active(_H100())

    def launcher(kernel: JITFunction, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            compiled = kernel.warmup(*arguments, grid=grid, **options)
            name, stack = f"{kernel.fn.__module__}.{kernel.fn.__name__}", _stack(compiled.asm["cubin"])
            found.append({"kernel": name, "shared": compiled.metadata.shared, "stack": stack})

        return launch

    JITFunction.__getitem__ = launcher
    calls = [(name, torch.bfloat16, sizes) for name in OPERATORS for sizes in SIZES[name]]
    for name, dtype, sizes in [*calls, *LARGE]:
        operator = OPERATORS[name]
        for one in operator.implementations:
            for arguments in variants(operator, dtype, sizes) if one.outputs else ():
                result, *kept = one.forward(*arguments)
                one.backward(torch.ones_like(result), *arguments, *kept)
    json.dump(found, sys.stdout)


def _stack(cubin: bytes) -> int:
    """Return the bytes of a thread's numbers for which there were no registers."""
    program = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(program), "--dump-resource-usage", file.name]
        told = subprocess.run(command, check=True, capture_output=True, text=True)
    match = re.search(r"STACK:(\d+)", told.stdout)
    assert match, told.stdout
    return int(match[1])


if __name__ == "__main__":
    main()
