"""A gate as a model uses it, on made-up inputs: what the contract and the costs stand on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.export import Dim

from ctr_models.gates.base import GATES, Gate, GateShape, GateSpec

MASKED = ("feature", "field", "selection", "cross", "fusion", "attention")
"""Slots in which models multiply by what ``forward`` returns."""
WEIGHING = ("expert", "interaction")
"""Slots whose result is weights of choices."""
HOOKS = {"attention": "attend", "sequence": "pool", "expert": "mixture"}
"""The method beside ``forward`` by which a gate may do its work in a slot."""


@dataclass(frozen=True)
class Sizes:
    """How large the inputs are.

    Args:
        rows: B, or P pairs in slot interaction.
        fields: F, which is also L, the positions of attention.
        dim: D of a field, of a head and of a behaviour.
        width: D of a vector: slots feature, cross, fusion, expert, depth.
        context: C.
        choices: K.
        heads: H.
        history: behaviours of the longest history; others are shorter, and some empty.
        even: all histories are of that length.
    """

    rows: int = 8
    fields: int = 5
    dim: int = 6
    width: int = 6
    context: int = 4
    choices: int = 3
    heads: int = 2
    history: int = 4
    even: bool = False


SMALL = Sizes()


@dataclass(frozen=True)
class Case:
    """A gate in a slot, with or without what the model may bring along there.

    Args:
        name: registered name or dotted path.
        slot: where it stands.
        context: whether the model supplies a context; in slot expert, histories.
    """

    name: str
    slot: str
    context: bool

    def __str__(self) -> str:
        return f"{self.name}-{self.slot}-{'context' if self.context else 'alone'}"

    @property
    def place(self) -> str:
        """Where the gate stands, in words."""
        brought = "histories" if self.slot == "expert" else "a context"
        return (
            f"{self.slot} with {brought}" if self.context and len(_given(self.type, self.slot)) > 1 else self.slot
        )

    @property
    def type(self) -> type[Gate]:
        """The gate's class."""
        return GATES[self.name]

    @property
    def claims_identity(self) -> bool:
        """Whether the gate's config takes ``start: identity``."""
        return "identity" in get_args(self.type.Config.model_fields["start"].annotation)

    @property
    def masks(self) -> bool:
        """Whether ``forward`` makes a mask here, and not a hook all of the work."""
        hook = HOOKS.get(self.slot)
        hooked = hook is not None and getattr(self.type, hook) is not getattr(Gate, hook)
        return self.slot in MASKED and not (hooked and self.type.forward is GATES["none"].forward)

    def gate(self, sizes: Sizes = SMALL, *, seed: int = 0, stirred: bool = False, **options: Any) -> Gate:
        """Make the gate; ``stirred`` moves every parameter away from its start, which may hide what it does."""
        torch.manual_seed(seed)
        width = {"feature": sizes.width, "cross": sizes.width, "fusion": sizes.width, "expert": sizes.width}
        width |= {"depth": sizes.width, "interaction": sizes.choices}
        context = {"selection": sizes.fields, "sequence": sizes.dim, "depth": 1, "attention": sizes.context}
        shape = GateShape(
            slot=self.slot,  # type: ignore[arg-type]
            width=width.get(self.slot, sizes.dim),
            context=context.get(self.slot, sizes.context) if self.context else 0,
            fields=sizes.fields,
            choices=sizes.choices,
            heads=sizes.heads,
        )
        gate = GateSpec.parse({"name": self.name, **options}).build(shape)
        for parameter in gate.parameters() if stirred else ():
            parameter.data += torch.randn_like(parameter)
        return gate

    def use(self, sizes: Sizes = SMALL, *, seed: int = 0, stirred: bool = False, **options: Any) -> Use:
        """Make the gate and the way in which a model uses it."""
        return Use(self.gate(sizes, seed=seed, stirred=stirred, **options), self.context)

    def control(self, sizes: Sizes = SMALL) -> Use:
        """Make gate ``none`` in the same place."""
        return Case("none", self.slot, self.context).use(sizes)


def cases(name: str) -> list[Case]:
    """Return the places in which a gate can stand.

    Example:
        >>> [str(case) for case in cases("sigmoid")]
        ['sigmoid-attention-context', 'sigmoid-cross-alone', 'sigmoid-cross-context', ...]
    """
    gate = GATES[name]
    return [Case(name, slot, context) for slot in sorted(gate.slots) for context in _given(gate, slot)]


def _given(gate: type[Gate], slot: str) -> tuple[bool, ...]:
    """Return whether models supply a context there: never, always, or the one and the other."""
    if slot in ("feature", "field"):
        return (False, True) if "context" in gate.Config.model_fields else (False,)
    return (False, True) if slot in ("cross", "fusion", "expert") else (slot != "interaction",)


class Use(nn.Module):
    """Calls a gate as a model with this slot does.

    Args:
        gate: the gate.
        context: whether the inputs hold a context; see :func:`inputs`.
    """

    def __init__(self, gate: Gate, context: bool) -> None:
        super().__init__()
        self.gate, self.context = gate, context

    def forward(self, *given: Tensor) -> Tensor:
        """Return the gated values, or what else the slot asks for; one row a row."""
        gate, slot = self.gate, self.gate.shape.slot
        if slot == "attention":
            scores, absent, values, x = given
            weights = gate.attend(scores.masked_fill(absent, -torch.inf), x)  # (B, H, L, L)
            return gate.gated(weights @ values, x)
        if slot == "sequence":
            return gate.pool(*given)
        if slot == "expert" and self.context:
            return gate.mixture(*given)
        if slot in ("expert", "interaction", "depth"):
            return gate(*given)
        return gate.gated(*given)


def inputs(
    case: Case, gate: Gate, sizes: Sizes = SMALL, *, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, ...]:
    """Return what :class:`Use` takes in the case's slot, random but always the same.

    ============  ====================================================================================
    attention     scores (B, H, L, L), which keys are absent (B, 1, 1, L), values (B, H, L, D), x (B, L, C)
    sequence      values (T, D), scores (T,), offsets (B + 1,), query (B, D)
    expert        x (B, D); with context besides values (T, C), offsets (B + 1,), query (B, C)
    interaction   logits (P, K)
    depth         x (B, D), doubt (B, 1)
    others        x; with context the context (B, C)
    ============  ====================================================================================
    """
    random = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)

    rows, fields, dim, context = sizes.rows, sizes.fields, sizes.dim, sizes.context
    longest = sizes.history
    lengths = torch.tensor([longest if sizes.even or i % 2 == 0 else max(0, longest - i) for i in range(rows)])
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    total = int(offsets[-1])
    if case.slot == "attention":
        absent = torch.arange(fields).view(1, 1, 1, fields) >= (fields - torch.arange(rows) % 3).view(-1, 1, 1, 1)
        scores, values = normal(rows, sizes.heads, fields, fields), normal(rows, sizes.heads, fields, dim)
        return scores, absent, values, normal(rows, fields, context)
    if case.slot == "sequence":
        return normal(total, dim), normal(total), offsets, normal(rows, dim)
    if case.slot == "expert" and case.context:
        return normal(rows, sizes.width), normal(total, context), offsets, normal(rows, context)
    if case.slot == "interaction":
        return (normal(rows, sizes.choices),)
    if case.slot == "depth":
        return normal(rows, sizes.width), torch.sigmoid(normal(rows, 1))
    if case.slot == "selection":
        return normal(rows, fields, dim), normal(rows, fields) / 2 + getattr(gate, "initial_logit", 0.0)
    x = normal(rows, fields, dim) if case.slot == "field" else normal(rows, sizes.width)
    return (x, normal(rows, context)) if case.context else (x,)


def dynamic(case: Case) -> tuple[dict[int, Any], ...]:
    """Return which dimensions of the inputs go with the rows and their behaviours, for torch.export."""
    rows, total = Dim("rows"), Dim("total")
    if case.slot == "sequence":
        sizes = [total, total, rows + 1, rows]
    elif case.slot == "expert" and case.context:
        sizes = [rows, total, rows + 1, rows]
    else:
        sizes = [rows] * len(inputs(case, case.gate()))
    return tuple({0: size} for size in sizes)


def row(case: Case, given: tuple[Tensor, ...], i: int) -> tuple[Tensor, ...]:
    """Return one row of the inputs, itself as inputs of one row."""
    jagged = {"sequence": 2, "expert": 2 if case.context else None}.get(case.slot)
    if jagged is None:
        return tuple(value[i : i + 1] for value in given)
    offsets = given[jagged]
    first, last = int(offsets[i]), int(offsets[i + 1])
    along = (0, 1) if case.slot == "sequence" else (1,)  # inputs that hold a value a behaviour
    return tuple(
        torch.tensor([0, last - first]) if j == jagged else value[first:last] if j in along else value[i : i + 1]
        for j, value in enumerate(given)
    )
