"""A gate's averaged weights, which say what it attends to more steadily than those of the moment."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ctr_models.gates.base import Gate


class Teacher(nn.Module):
    """Exponential average t of a gate's weights w: t <- decay t + (1 - decay) w at each :meth:`update`.

    The average stands in buffers: it does not learn, and a checkpoint holds it.

    Args:
        gate: with a method ``attention(values, offsets, query)`` that gives each behaviour a number, (T,).
        decay: the average looks back over about 1 / (1 - decay) updates.

    Example:
        >>> from ctr_models.gates import GateShape, GateSpec
        >>> shape = GateShape(slot="expert", width=3, context=4, choices=2)
        >>> gate = GateSpec(name="attention_weighted").build(shape)
        >>> teacher = Teacher(gate, decay=0.9)
        >>> teacher.update(gate)
        >>> teacher(gate, torch.randn(3, 4), torch.tensor([0, 2, 3]), torch.randn(2, 4)).shape
        torch.Size([3])

    Source: the teacher of MHIM-MIL, arXiv 2307.15254.
    """

    def __init__(self, gate: Gate, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self._names = [name for name, _ in gate.named_parameters()]
        for number, weight in enumerate(gate.parameters()):
            self.register_buffer(f"average{number}", weight.detach().clone())

    @torch.no_grad()
    def update(self, gate: Gate) -> None:
        """Take the gate's weights into the average."""
        weights = [weight.detach() for weight in gate.parameters()]
        torch._foreach_lerp_(list(self.buffers()), weights, 1 - self.decay)

    @torch.no_grad()
    def forward(self, gate: Gate, *inputs: Tensor) -> Tensor:
        """Return the attention that the gate would give with the averaged weights, (T,)."""
        averages = {f"gate.{name}": own for name, own in zip(self._names, self.buffers(), strict=True)}
        return functional_call(_Attention(gate), averages, inputs)


class _Attention(nn.Module):
    """Makes the attention the module's output, as ``functional_call`` needs it."""

    def __init__(self, gate: Gate) -> None:
        super().__init__()
        self.gate = gate

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.gate.attention(*inputs)  # type: ignore[operator]
