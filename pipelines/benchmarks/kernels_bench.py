"""``sluice bench kernels``: every operator against eager torch, torch.compile and what the machine can do at most.

The bounds are measured in the same run: the bandwidth of a copy and the rate of a matrix product. An operator's
roofline is the longer of the two times that its bytes and its operations need at those.
"""

from __future__ import annotations

import logging
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ctr_models.errors import ConfigError, nearest
from pipelines.benchmarks.measure import timed
from pipelines.benchmarks.report import AtLeast, AtMost, BenchReport, JsonPath, known, progress

if TYPE_CHECKING:
    import torch

    from kernels.dispatch import Operator


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
    operators: Annotated[str, typer.Option(help="Operators, comma-separated; or all, or none.")] = "all",
    ratios: Annotated[
        str, typer.Option(help="Of target_attention, constant_context, scores; or all, or none.")
    ] = "all",
    device: Annotated[str, typer.Option(help="cpu or cuda; the GPU where there is one.")] = "",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16, of the operators.")] = "float32",
    rows: Annotated[
        int | None,
        typer.Option(min=1, help="Leave out sizes of more rows; 4096 on CPU, none on a GPU.", show_default=False),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Times that every way is measured, in turn.")] = 5,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="Time torch.compile too.")] = True,
    json: JsonPath = None,
    at_least: AtLeast = None,
    at_most: AtMost = None,
) -> None:
    """Time of each operator, forward alone and with its backward, on a grid of sizes; and what models gain by them.

    torch.compile tunes (max-autotune). On CPU sizes of more than 4,096 rows are left out: see --rows.

    Example: sluice bench kernels --operators gated_cross --ratios none --at-most overhead_us=10

    Example: sluice bench kernels --operators none --at-least ratio_target_attention=6

    Example: sluice bench kernels --device cuda --dtype bfloat16 --json figures.json
    """
    import torch
    from rich.console import Console

    from kernels import OPERATORS
    from pipelines.benchmarks.kernel_ratios import RATIOS, Setting

    chosen = [OPERATORS[name] for name in _named(operators, list(OPERATORS), "operator")]
    wanted = _named(ratios, list(RATIOS), "ratio")
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if dtype not in kinds:
        raise ConfigError(f"no type {dtype!r}", where="--dtype", remedy=nearest(dtype, list(kinds)))
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if where not in ("cpu", "cuda") or (where == "cuda" and not torch.cuda.is_available()):
        raise ConfigError(f"no device {where!r} here", where="--device", remedy="use cpu")
    title = f"Kernels on {torch.cuda.get_device_name() if where == 'cuda' else 'the CPU'}, {dtype}"
    columns = ["operator", "sizes", "pass", "way", "ms", "vs eager", "vs compile", "of the roofline"]
    report = BenchReport(title, columns)
    report.note(
        f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    if compiled:
        _quieten()
    most = rows or (4096 if where == "cpu" else None)
    grid = [(one, sizes) for one in chosen for sizes in sizes_up_to(one, most)]
    known(figures(grid, wanted, compiled), at_least, at_most)
    with progress(Console(stderr=True), len(grid) + len(wanted)) as step:
        if grid:
            _operators(report, grid, where, kinds[dtype], rounds, compiled, step)
        for name in wanted:
            step(f"ratio {name}")
            RATIOS[name].measure(report, Setting(where, rounds, compiled))
    report.figures["overhead_us"] = overhead() * 1e6
    report.note(f"choosing an implementation adds {report.figures['overhead_us']:.2f} microseconds to a call")
    report.finish(json, at_least, at_most)


def figures(
    grid: Sequence[tuple[Operator, dict[str, int]]], ratios: Sequence[str], compiled: bool
) -> Iterator[str]:
    """Yield the names of all figures that there may be: a definition that has no room has no ratio.

    Args:
        grid: operators and their sizes.
        ratios: names of :data:`pipelines.benchmarks.kernel_ratios.RATIOS`.
        compiled: whether torch.compile is timed.
    """
    from pipelines.benchmarks.kernel_ratios import RATIOS

    yield "overhead_us"
    for name in ratios:
        yield from (figure for figure in RATIOS[name].figures if compiled or "compile" not in figure)
    for operator, sizes in grid:
        for key in (_key(operator, sizes, backward) for backward in (False, True)):
            yield from (f"ratio_eager_{key}", f"roofline_{key}")
            if compiled:
                yield f"ratio_compile_{key}"


def _key(operator: Operator, sizes: dict[str, int], backward: bool) -> str:
    words = [operator.name, *(f"{name}{size}" for name, size in sizes.items())]
    return "_".join([*words, "step" if backward else "forward"])


def _named(words: str, known: list[str], what: str) -> list[str]:
    """Return the names in a comma-separated list, all of them or none."""
    if words in ("all", "none"):
        return known if words == "all" else []
    names = [name.strip() for name in words.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise ConfigError(
                f"no {what} {name!r}", where=f"--{what}s", remedy=nearest(name, [*known, "all", "none"])
            )
    return names


def _quieten() -> None:
    """Let torch.compile tune without telling of each choice, and of each definition that it compiles in two."""
    import torch
    from torch._inductor import select_algorithm

    select_algorithm.PRINT_AUTOTUNE = False
    torch._logging.set_logs(dynamo=logging.ERROR)
    warnings.filterwarnings("ignore", "TypedStorage is deprecated")


def _processor() -> str:
    """Return the processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def sizes_up_to(operator: Operator, rows: int | None) -> list[dict[str, int]]:
    """Return an operator's sizes of at most so many rows, or candidates of a user; None stands for all."""
    grid = operator.workload.grid if operator.workload else ()
    return [one for one in grid if rows is None or one.get("rows", one.get("each", 0)) <= rows]


def _operators(
    report: BenchReport,
    grid: Sequence[tuple[Operator, dict[str, int]]],
    device: str,
    dtype: torch.dtype,
    rounds: int,
    compiled: bool,
    step: Callable[[str], None],
) -> None:
    """Add the rows and figures of the operators, each on its grid."""
    import torch

    machine = measured(device, dtype)
    report.note(
        f"a copy moves {machine.bandwidth / 1e9:.1f} GB/s, a product computes {machine.rate / 1e9:.0f} Gflop/s; "
        "the roofline counts each input and output once, a backward as two forwards; a cache may pass it"
    )
    for operator, sizes in grid:
        assert operator.workload is not None
        shown = ", ".join(f"{k} {v:,}" for k, v in sizes.items())
        step(f"{operator.name}, {shown}")
        arguments = operator.workload.make(torch.Generator().manual_seed(0), device, dtype, **sizes)
        ways: dict[str, Callable[..., Any]] = {"fused": operator, "eager": operator.reference}
        if compiled:
            # Of more than a few sizes in all, torch.compile gives a function up and runs it as it is.
            torch._dynamo.reset()
            mode = "max-autotune-no-cudagraphs"
            ways["compile"] = torch.compile(operator.reference, mode=mode, dynamic=False)
        bound = machine.roofline(operator.workload.moved(*arguments), operator.workload.computed(*arguments))
        for backward in (False, True):
            calls = {way: call(way_of, arguments, backward) for way, way_of in ways.items()}
            seconds = timed({way: one for way, one in calls.items() if has_room(one)}, rounds, device)
            key = _key(operator, sizes, backward)
            ratios = {way: seconds[way] / seconds["fused"] for way in ("eager", "compile") if way in seconds}
            report.figures |= {f"ratio_{way}_{key}": ratio for way, ratio in ratios.items()}
            report.figures[f"roofline_{key}"] = bound * (3 if backward else 1) / seconds["fused"]
            report.row(
                operator.name,
                shown,
                "forward + backward" if backward else "forward",
                operator.chosen(*arguments),
                seconds["fused"] * 1e3,
                ratios.get("eager", "no room"),
                ratios.get("compile", "no room" if compiled else ""),
                report.figures[f"roofline_{key}"],
            )


def has_room(one: Callable[[], Any]) -> bool:
    """Whether a call's tensors fit a GPU's memory: a definition may lay out what its operator never does."""
    import torch

    try:
        one()
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return False
    return True


def measured(device: str, dtype: Any) -> Machine:
    """Measure the device: a copy of 256 MB, and a product of two matrices of 2,048 (8,192 on a GPU)."""
    import torch

    from kernels.product import product

    size = 8192 if device == "cuda" else 2048
    source = torch.empty(1 << 28, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    left = torch.randn(size, size, device=device).to(dtype)
    seconds = timed({"copy": lambda: target.copy_(source), "product": lambda: product(left, left)}, 5, device)
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
