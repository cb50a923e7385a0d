"""What a model gains by the operators, each against the usual way to compute the same: figures for bars.

``sluice bench kernels`` measures them. Every ratio is told the report to which it adds its rows and figures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from pipelines.benchmarks.measure import peak_memory, timed
from pipelines.benchmarks.report import BenchReport
from pipelines.benchmarks.score_ratios import FIGURES, scores

if TYPE_CHECKING:
    from kernels import ActivatedLayer

FRAPPE = (957, 4082, 7, 7, 2, 3, 2, 9, 80, 233)
"""Values of each field of Frappe_x1."""
FINALMLP: dict[str, Any] = {
    "mlp1": {"hidden": [400], "dropout": 0.4, "batch_norm": True},
    "mlp2": {"hidden": [100], "dropout": 0.4, "batch_norm": True},
    "heads": 5,
    "gates": {"feature": {"name": "sigmoid2", "context": "learned", "learned_size": 10, "hidden": [400]}},
}
"""As published for Frappe_x1, but for the contexts: none, which is one learned vector for all rows."""
TRAINING: dict[str, Any] = {"embedding": {"backend": "dense", "l2": 0.05}}


@dataclass(frozen=True)
class Setting:
    """How the ratios are measured.

    Args:
        device: ``cpu`` or ``cuda``.
        rounds: times that every way is measured, in turn.
        compiled: whether torch.compile of the usual way is measured too.
        rows: B.
    """

    device: str
    rounds: int
    compiled: bool
    rows: int = 4096


class TargetAttentionInput:
    """DIN's attention as in training: hidden layers of 80 and 40 behind Dice, over jagged histories.

    Lengths are geometric of mean 30 and cut at 200.

    Args:
        rows: B.
        width: d of behaviours and candidates.
        device: ``cpu`` or ``cuda``.
    """

    def __init__(self, rows: int, width: int, device: str) -> None:
        from kernels import ActivatedLayer
        from kernels.target_layer import geometric_offsets

        generator = torch.Generator().manual_seed(0)
        self.leaves: list[Tensor] = []

        def leaf(*shape: int, scale: float = 1.0) -> Tensor:
            found = (torch.randn(*shape, generator=generator) * scale).to(device).requires_grad_()
            self.leaves.append(found)
            return found

        offsets = geometric_offsets(generator, rows)
        self.longest = int(offsets.diff().max())
        self.offsets = offsets.to(device)
        self.values, self.query = leaf(int(offsets[-1]), width), leaf(rows, width)
        self.first = leaf(80, 4 * width, scale=(4 * width) ** -0.5), leaf(80)
        self.layers: list[ActivatedLayer] = [
            ActivatedLayer(leaf(m, h, scale=h**-0.5), leaf(m), "dice", alpha=leaf(h))
            for h, m in ((80, 40), (40, 1))
        ]
        self.gradient = torch.randn(rows, width, generator=generator).to(device)

    def step(self, way: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        """Go forward and backward, to behaviours, candidates and weights."""
        out = way(self.values, self.offsets, self.query, self.first, self.layers)
        return torch.autograd.grad(out, self.leaves, self.gradient)


def target_attention(report: BenchReport, setting: Setting, width: int = 32) -> None:
    """Time and peak memory of target attention against histories padded to the longest and [q, k, q - k, q * k]."""
    from kernels.target_attention import padded
    from kernels.target_attention import target_attention as ours

    given = TargetAttentionInput(setting.rows, width, setting.device)
    usual = partial(padded, longest=given.longest)
    calls: dict[str, Callable[[], Any]] = {"ours": partial(given.step, ours), "usual": partial(given.step, usual)}
    if setting.compiled:
        mode = "max-autotune-no-cudagraphs"
        calls["compile"] = partial(given.step, torch.compile(usual, mode=mode, dynamic=False))
    memory = {way: peak_memory(calls[way], setting.device) for way in ("ours", "usual")}
    seconds = timed(calls, setting.rounds, setting.device)
    report.figures["memory_target_attention"] = memory["ours"] / memory["usual"]
    _tell(report, "target_attention", f"rows {setting.rows:,}, width {width}", "forward + backward", seconds)
    report.note(
        f"target_attention: {given.values.shape[0]:,} behaviours, up to {given.longest} a row; hidden 80, 40; "
        f"eager pads and concatenates; at its height {memory['ours'] / 1e6:.0f} MB against "
        f"{memory['usual'] / 1e6:.0f} MB, {report.figures['memory_target_attention']:.3f} of it"
    )


class _EveryRow(nn.Module):
    """The learned context of a gate, given to it once a row, as the official code does."""

    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self._gate = (gate,)  # in a tuple: no submodule

    def forward(self, batch: Any, embedded: Any) -> Tensor:
        return self._gate[0].learned.repeat(len(batch), 1)


def constant_context_ways(setting: Setting) -> dict[str, Any]:
    """Return two trainings of one FinalMLP, whose gates compute a constant context once or once a row."""
    from ctr_models import Gate, Schema, create_model
    from pipelines.training.config import TrainConfig
    from pipelines.training.distributed import Ranks
    from pipelines.training.engine import Engine

    schema = Schema.of({f"field{place}": values for place, values in enumerate(FRAPPE)}, dim=10)
    engines = {}
    for way in ("ours", "usual"):
        torch.manual_seed(0)
        model = create_model("finalmlp", schema, **FINALMLP)
        if way == "usual":
            for place, gate in enumerate(model.inputs.feature_gates):  # type: ignore[union-attr, arg-type]
                model.inputs.contexts[place] = _EveryRow(gate)  # type: ignore[union-attr, index]
                gate.gated = partial(Gate.gated, gate)  # by its modules, which the trainer makes as fast as ours
        engines[way] = Engine(model, TrainConfig(**TRAINING), Ranks(0, 1, torch.device(setting.device)))
        engines[way].train()
    return engines


def constant_context(report: BenchReport, setting: Setting) -> None:
    """A training step of FinalMLP without a context, against the same with gates computed once a row."""
    from ctr_models import example_batch

    engines = constant_context_ways(setting)
    batch = example_batch(engines["ours"].model.schema, rows=setting.rows).to(torch.device(setting.device))
    seconds = timed({way: partial(one.step, batch) for way, one in engines.items()}, setting.rounds, setting.device)
    _tell(report, "constant_context", f"rows {setting.rows:,}", "training step", seconds)
    report.note(
        "constant_context: FinalMLP with Frappe's published sizes, one learned context; eager gates row by row"
    )


def _tell(report: BenchReport, name: str, sizes: str, what: str, seconds: dict[str, float]) -> None:
    ratios = {f"ratio_{name}": seconds["usual"] / seconds["ours"]}
    if "compile" in seconds:
        ratios[f"ratio_compile_{name}"] = seconds["compile"] / seconds["ours"]
    report.figures |= ratios
    compiled = ratios.get(f"ratio_compile_{name}", "")
    report.row(name, sizes, what, "ours", seconds["ours"] * 1e3, ratios[f"ratio_{name}"], compiled, "")


class Ratio(NamedTuple):
    """Something that ``sluice bench kernels`` measures beside the operators.

    Args:
        measure: adds rows and figures to a report.
        figures: names of those; of them with ``compile`` in it only if torch.compile is measured.
    """

    measure: Callable[[BenchReport, Setting], None]
    figures: Sequence[str]


RATIOS = {
    "target_attention": Ratio(
        target_attention, [f"{what}_target_attention" for what in ("ratio", "ratio_compile", "memory")]
    ),
    "constant_context": Ratio(constant_context, ["ratio_constant_context"]),
    "scores": Ratio(scores, FIGURES),
}
