"""``sluice bench kernels``: every operator against eager torch, torch.compile and what the machine can do at most.

The bounds are measured in the same run: the bandwidth of a copy and the rate of a matrix product. An operator's
roofline is the longer of the two times that its bytes and its operations need at those.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from ctr_models.errors import ConfigError, nearest
from pipelines.benchmarks.report import AtLeast, AtMost, BenchReport, JsonPath


@dataclass(frozen=True)
class Machine:
    """What a device can do at most, as measured now.

    Args:
        bandwidth: bytes a second, read and written, of a copy.
        rate: floating-point operations a second of a matrix product.
    """

    bandwidth: float
    rate: float

    def roofline(self, moved: int, computed: int) -> float:
        """Return the seconds below which nothing can be done.

        Example:
            >>> Machine(bandwidth=100.0, rate=10.0).roofline(moved=200, computed=50)
            5.0
        """
        return max(moved / self.bandwidth, computed / self.rate)


def main(
    operators: Annotated[str, typer.Option(help="Comma-separated; all by default.")] = "",
    device: Annotated[str, typer.Option(help="cpu or cuda; the GPU where there is one.")] = "",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    rounds: Annotated[int, typer.Option(min=1, help="Times that every way is measured, in turn.")] = 5,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="Time torch.compile too.")] = True,
    json: JsonPath = None,
    at_least: AtLeast = None,
    at_most: AtMost = None,
) -> None:
    """Time of each operator, forward alone and with its backward, on a grid of sizes.

    Example: sluice bench kernels --operators gated_cross --at-most overhead_us=10
    """
    import torch

    from kernels import OPERATORS

    wanted = [name.strip() for name in operators.split(",") if name.strip()] or list(OPERATORS)
    for name in wanted:
        if name not in OPERATORS:
            raise ConfigError(f"no operator {name!r}", where="--operators", remedy=nearest(name, list(OPERATORS)))
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if dtype not in kinds:
        raise ConfigError(f"no type {dtype!r}", where="--dtype", remedy=nearest(dtype, list(kinds)))
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if where not in ("cpu", "cuda") or (where == "cuda" and not torch.cuda.is_available()):
        raise ConfigError(f"no device {where!r} here", where="--device", remedy="use cpu")
    machine = measured(where, kinds[dtype])
    title = f"Kernels on {torch.cuda.get_device_name() if where == 'cuda' else 'the CPU'}, {dtype}"
    columns = ["operator", "sizes", "pass", "way", "ms", "vs eager", "vs compile", "of the roofline"]
    report = BenchReport(title, columns)
    report.note(
        f"a copy moves {machine.bandwidth / 1e9:.1f} GB/s, a product computes {machine.rate / 1e9:.0f} Gflop/s; "
        "the roofline counts each input and output once; a backward is counted as two forwards"
    )
    for name in wanted:
        operator = OPERATORS[name]
        assert operator.workload is not None
        for sizes in operator.workload.grid:
            arguments = operator.workload.make(torch.Generator().manual_seed(0), where, kinds[dtype], **sizes)
            ways: dict[str, Callable[..., Any]] = {"fused": operator, "eager": operator.reference}
            if compiled:
                mode = "max-autotune-no-cudagraphs" if where == "cuda" else "default"
                ways["compile"] = torch.compile(operator.reference, mode=mode, dynamic=False)
            bound = machine.roofline(operator.workload.moved(*arguments), operator.workload.computed(*arguments))
            for backward in (False, True):
                calls = {way: call(way_of, arguments, backward) for way, way_of in ways.items()}
                seconds = timed(calls, rounds, where)
                key = "_".join([name, *(f"{k}{v}" for k, v in sizes.items()), "step" if backward else "forward"])
                report.figures[f"ratio_eager_{key}"] = seconds["eager"] / seconds["fused"]
                if compiled:
                    report.figures[f"ratio_compile_{key}"] = seconds["compile"] / seconds["fused"]
                report.figures[f"roofline_{key}"] = bound * (3 if backward else 1) / seconds["fused"]
                report.row(
                    name,
                    ", ".join(f"{k} {v:,}" for k, v in sizes.items()),
                    "forward + backward" if backward else "forward",
                    operator.chosen(*arguments),
                    seconds["fused"] * 1e3,
                    report.figures[f"ratio_eager_{key}"],
                    report.figures[f"ratio_compile_{key}"] if compiled else "",
                    report.figures[f"roofline_{key}"],
                )
    report.figures["overhead_us"] = overhead() * 1e6
    report.note(f"choosing an implementation adds {report.figures['overhead_us']:.2f} microseconds to a call")
    report.finish(json, at_least, at_most)


def measured(device: str, dtype: Any) -> Machine:
    """Measure the device: a copy of 256 MB, and a product of two matrices of 2,048 (8,192 on a GPU)."""
    import torch

    size = 8192 if device == "cuda" else 2048
    source = torch.empty(1 << 28, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    left = torch.randn(size, size, device=device).to(dtype)
    seconds = timed({"copy": lambda: target.copy_(source), "product": lambda: left @ left}, 5, device)
    return Machine(2 * source.numel() / seconds["copy"], 2 * size**3 / seconds["product"])


def call(way: Callable[..., Any], arguments: tuple[Any, ...], backward: bool) -> Callable[[], Any]:
    """Return one pass of a way: forward without gradients, or forward and backward to every floating tensor."""
    import torch

    if not backward:

        def forward() -> Any:
            with torch.no_grad():
                return way(*arguments)

        return forward
    leaves = [
        a.detach().requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a
        for a in arguments
    ]
    wanted = [a for a in leaves if isinstance(a, torch.Tensor) and a.requires_grad]
    with torch.no_grad():
        gradient = torch.ones_like(way(*arguments))
    return lambda: torch.autograd.grad(way(*leaves), wanted, gradient, allow_unused=True)


def timed(calls: dict[str, Callable[[], Any]], rounds: int, device: str, least: float = 0.05) -> dict[str, float]:
    """Return the seconds of one call of each, the best of the rounds; the calls take turns in each round."""
    import torch

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    repeats, best = {}, dict.fromkeys(calls, float("inf"))
    for name, one in calls.items():
        for _ in range(3):  # the last of them without compilation or first touch
            wait()
            start = time.perf_counter()
            one()
            wait()
            once = time.perf_counter() - start
        repeats[name] = max(1, int(least / max(once, 1e-7)))
    for _ in range(rounds):
        for name, one in calls.items():
            wait()
            start = time.perf_counter()
            for _ in range(repeats[name]):
                one()
            wait()
            best[name] = min(best[name], (time.perf_counter() - start) / repeats[name])
    return best


def overhead() -> float:
    """Return the seconds that the choice of an implementation adds to a call: the median of many single calls."""
    import torch

    from kernels.dispatch import Implementation, Operator

    x = torch.ones(1)
    own = Implementation("own", "cpu", lambda x: True, lambda x: (x + 1,), lambda gradient, x: (gradient,))
    operator = Operator("overhead", lambda x: x + 1, "Tensor x", (own,))

    def median(one: Callable[[Any], Any]) -> float:
        found = []
        for _ in range(2000):
            start = time.perf_counter()
            one(x)
            found.append(time.perf_counter() - start)
        return statistics.median(found)

    with torch.no_grad():
        return median(operator) - median(lambda x: x + 1)
