"""Which implementation of an operator runs: the plain one, or a faster one that the inputs allow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

NAMESPACE = "sluice"
"""Of the operators in ``torch.ops``."""


@dataclass(frozen=True)
class Implementation:
    """One faster way to compute an operator, forward and backward.

    Args:
        name: of the way, for example ``triton``.
        device: the device type on which it runs.
        allows: told the operator's arguments, says whether it takes them: by dtype and shape, never by values.
        forward: told the arguments, returns the result first, then whatever else the backward needs.
        backward: told the gradient of the result, the arguments, and what else the forward returned; returns one
            gradient an argument, None for those that have none.
        outputs: told the arguments, returns empty tensors of the shapes and types of all that ``forward`` returns.
            An implementation that has them is an operator of torch, which torch.compile and export call as it is.
            Without, they see the plain definition, which they fuse in their own way and which needs nothing of
            Sluice where the program runs.
        returns: how many tensors ``forward`` returns.
        worth: told arguments that it takes, says whether they are enough to be faster than by the definition; by
            shape only.
    """

    name: str
    device: str
    allows: Callable[..., bool]
    forward: Callable[..., tuple[Tensor, ...]]
    backward: Callable[..., tuple[Tensor | None, ...]]
    outputs: Callable[..., tuple[Tensor, ...]] | None = None
    returns: int = 1
    worth: Callable[..., bool] = lambda *_arguments: True


@dataclass(frozen=True)
class Workload:
    """Arguments of an operator for tests and benchmarks, and the least that has to be done for them.

    Args:
        make: told a generator, a device, a dtype and sizes by name, returns arguments.
        grid: sizes worth measuring, by name.
        moved: told the arguments, returns the bytes of a forward that reads each input and writes each output once.
        computed: told the arguments, returns the floating-point operations of a forward.
    """

    make: Callable[..., tuple[Any, ...]]
    grid: tuple[dict[str, int], ...]
    moved: Callable[..., int]
    computed: Callable[..., int]


def product_type(dtype: torch.dtype) -> Any:
    """Return the type in which a Triton kernel multiplies tiles of ``dtype``: the same, but for the interpreter.

    The interpreter keeps bfloat16 as bits and would multiply those.
    """
    if triton.knobs.runtime.interpret:
        return tl.float32
    return {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[dtype]


class Operator:
    """A function of tensors with a plain definition and faster implementations of the same.

    Called, it takes the first implementation that stands on the tensors' device, allows the arguments and is worth
    while for them, and otherwise the reference. The choice is by Python alone, a microsecond, and the fast way is
    called directly; only while torch.compile or export trace the call does it go through torch's own dispatcher, as
    the operator ``sluice::<name>_<implementation>`` with its shapes and its gradient registered.

    Args:
        name: of the operator.
        reference: the definition, in plain torch; its first argument is a tensor.
        schema: the arguments in torch's schema language, for example ``Tensor x, Tensor? bias, int heads``.
        implementations: faster ones, best first.
        workload: what tests and benchmarks call it with.

    Example:
        >>> def plain(x: Tensor, y: Tensor) -> Tensor:
        ...     return x * y
        >>> multiply = Operator("multiply_example", plain, "Tensor x, Tensor y")
        >>> multiply(torch.ones(2), torch.ones(2))
        tensor([1., 1.])
        >>> multiply.chosen(torch.ones(2), torch.ones(2))
        'reference'
    """

    def __init__(
        self,
        name: str,
        reference: Callable[..., Tensor],
        schema: str,
        implementations: Sequence[Implementation] = (),
        workload: Workload | None = None,
    ) -> None:
        self.name, self.reference, self.schema, self.workload = name, reference, schema, workload
        self.implementations = tuple(implementations)
        self._traced = {one.name: _registered(name, schema, one) for one in self.implementations if one.outputs}

    def __call__(self, *arguments: Any, fused: bool = True) -> Tensor:
        """Compute the operator; ``fused=False`` computes its definition."""
        one = self._choose(arguments) if fused else None
        if one is None:
            return self.reference(*arguments)
        if torch.compiler.is_compiling():
            found = self._traced[one.name](*arguments)
            return found if isinstance(found, Tensor) else found[0]
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments):
            return _Fast.apply(one, *arguments)
        return one.forward(*arguments)[0]

    def chosen(self, *arguments: Any) -> str:
        """Return the name of the implementation that a call with these arguments takes."""
        one = self._choose(arguments)
        return "reference" if one is None else one.name

    def _choose(self, arguments: tuple[Any, ...]) -> Implementation | None:
        device = arguments[0].device.type
        # Autocast rewrites the operations of the definition one by one; there is nothing to rewrite in a fast way.
        if not self.implementations or torch.is_autocast_enabled(device):
            return None
        traced = torch.compiler.is_compiling()
        # Whoever counts or records operations is told those of the definition.
        if not traced and _get_current_dispatch_mode() is not None:
            return None
        for one in self.implementations:
            # What isn't registered is not even asked: its questions would bind sizes that are to stay dynamic.
            here = one.device == device and (one.outputs or not traced)
            if here and one.allows(*arguments) and one.worth(*arguments):
                return one
        return None


class _Fast(torch.autograd.Function):
    """An implementation in eager mode, without torch's dispatcher between."""

    @staticmethod
    def forward(ctx: Any, one: Implementation, *arguments: Any) -> Tensor:
        result, *kept = one.forward(*arguments)
        ctx.one = one
        ctx.plain = [None if isinstance(a, Tensor) else a for a in arguments]
        ctx.places = [place for place, a in enumerate(arguments) if isinstance(a, Tensor)]
        ctx.save_for_backward(*(arguments[place] for place in ctx.places), *kept)
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        arguments, tensors = list(ctx.plain), len(ctx.places)
        for place, tensor in zip(ctx.places, saved[:tensors], strict=True):
            arguments[place] = tensor
        return (None, *ctx.one.backward(gradient, *arguments, *saved[tensors:]))


def _registered(name: str, schema: str, one: Implementation) -> Callable[..., Any]:
    """Make an implementation an operator of torch, with its shapes and its gradient; return the operator."""
    assert one.outputs is not None
    own, outputs = f"{NAMESPACE}::{name}_{one.name}", one.outputs
    kinds = [part.split()[0] for part in schema.split(", ")]
    tensors = [place for place, kind in enumerate(kinds) if kind.startswith("Tensor")]
    returned = ", ".join(["Tensor"] * one.returns)
    kept = "".join(f", Tensor kept_{number}" for number in range(one.returns - 1))

    forward = torch.library.custom_op(
        own,
        lambda *arguments: _alone(one.forward(*arguments)),
        mutates_args=(),
        device_types=one.device,
        schema=f"({schema}) -> ({returned})",
    )
    forward.register_fake(lambda *arguments: _alone(outputs(*arguments)))

    def gradients(gradient: Tensor, *rest: Any) -> Tensor | tuple[Tensor, ...]:
        found = one.backward(gradient.contiguous(), *rest)
        return _alone(
            tuple(
                gradient.new_empty(0)
                if not _has_gradient(rest[place])
                else torch.zeros_like(rest[place], memory_format=torch.contiguous_format)
                if (slope := found[place]) is None
                else slope
                for place in tensors
            )
        )

    backward = torch.library.custom_op(
        f"{own}_backward",
        gradients,
        mutates_args=(),
        device_types=one.device,
        schema=f"(Tensor gradient, {schema}{kept}) -> ({', '.join(['Tensor'] * len(tensors))})",
    )

    def shapes(gradient: Tensor, *rest: Any) -> Tensor | tuple[Tensor, ...]:
        return _alone(
            tuple(
                rest[place].new_empty(rest[place].shape) if _has_gradient(rest[place]) else gradient.new_empty(0)
                for place in tensors
            )
        )

    backward.register_fake(shapes)

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.inputs = [None if place in tensors else a for place, a in enumerate(inputs)]
        ctx.present = [place for place in tensors if inputs[place] is not None]
        kept = () if isinstance(output, Tensor) else output[1:]
        ctx.save_for_backward(*(inputs[place] for place in ctx.present), *kept)

    def backpropagate(ctx: Any, gradient: Tensor, *_kept: Any) -> tuple[Tensor | None, ...]:
        saved, arguments = ctx.saved_tensors, list(ctx.inputs)
        for place, tensor in zip(ctx.present, saved, strict=False):
            arguments[place] = tensor
        slopes = backward(gradient, *arguments, *saved[len(ctx.present) :])
        found = dict(zip(tensors, (slopes,) if isinstance(slopes, Tensor) else slopes, strict=True))
        wanted = ctx.needs_input_grad
        return tuple(found[p] if p in ctx.present and wanted[p] else None for p in range(len(arguments)))

    forward.register_autograd(backpropagate, setup_context=setup)
    return forward


def _alone(found: tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
    """Return what torch expects of an operator: the tensor itself where there is one."""
    return found[0] if len(found) == 1 else found


def _has_gradient(argument: Tensor | None) -> bool:
    return argument is not None and argument.is_floating_point()
