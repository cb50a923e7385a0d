from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kernels.dispatch import Implementation, Operator


def _plain(x: Tensor, y: Tensor | None, power: int) -> Tensor:
    return x**power if y is None else x**power * y


def _fast(x: Tensor, y: Tensor | None, power: int) -> tuple[Tensor, Tensor]:
    raised = x**power
    return (raised.clone() if y is None else raised * y), raised


def _fast_backward(gradient: Tensor, x: Tensor, y: Tensor | None, power: int, raised: Tensor):
    slope = gradient * power * x ** (power - 1)
    return (slope, None, None) if y is None else (slope * y, gradient * raised, None)


def _outputs(x: Tensor, y: Tensor | None, power: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


def _operator(name: str, *, traced: bool) -> tuple[Operator, list[str]]:
    calls: list[str] = []

    def forward(*arguments):
        calls.append("fast")
        return _fast(*arguments)

    one = Implementation(
        "own", "cpu", lambda x, y, power: x.dtype == torch.float64, forward, _fast_backward,
        _outputs if traced else None, returns=2,
    )  # fmt: skip
    return Operator(name, _plain, "Tensor x, Tensor? y, int power", (one,)), calls


def _arguments() -> tuple[Tensor, Tensor]:
    return (
        torch.rand(3, 2, dtype=torch.float64, requires_grad=True),
        torch.rand(3, 2, dtype=torch.float64, requires_grad=True),
    )


def test_the_first_implementation_that_allows_the_arguments_runs() -> None:
    operator, calls = _operator("choice", traced=False)
    x, y = _arguments()
    assert operator.chosen(x, y, 2) == "own" and operator.chosen(x.float(), y.float(), 2) == "reference"
    torch.testing.assert_close(operator(x, y, 2), _plain(x, y, 2))
    assert calls == ["fast"]
    torch.testing.assert_close(operator(x.float(), y.float(), 2), _plain(x.float(), y.float(), 2))
    operator(x, y, 2, fused=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        operator(x, y, 2)
    assert calls == ["fast"]


def test_too_little_is_computed_by_the_definition() -> None:
    operator, calls = _operator("worth_example", traced=True)
    (own,) = operator.implementations
    operator.implementations = (replace(own, worth=lambda x, y, power: len(x) > 3),)
    x, y = _arguments()
    assert operator.chosen(x, y, 2) == "reference"
    operator(x, y, 2)
    assert not calls
    assert operator.chosen(torch.cat((x, x)), torch.cat((y, y)), 2) == "own"


def test_its_gradients_are_the_implementations() -> None:
    operator, _ = _operator("gradients", traced=False)
    x, y = _arguments()
    assert torch.autograd.gradcheck(lambda x, y: operator(x, y, 3), (x, y))
    assert torch.autograd.gradcheck(lambda x: operator(x, None, 3), (x,))
    assert torch.autograd.gradcheck(lambda y: operator(x.detach(), y, 3), (y,))


def test_without_gradients_nothing_is_kept() -> None:
    operator, _ = _operator("inference", traced=False)
    x, y = _arguments()
    with torch.no_grad():
        assert operator(x, y, 2).grad_fn is None
    assert operator(x.detach(), y.detach(), 2).grad_fn is None


def test_traced_it_is_an_operator_of_torch() -> None:
    operator, calls = _operator("traced", traced=True)
    x, y = _arguments()
    torch.library.opcheck(torch.ops.sluice.traced_own.default, (x, y, 2))
    torch.library.opcheck(torch.ops.sluice.traced_own.default, (x, None, 2))
    calls.clear()
    compiled = torch.compile(lambda x, y: operator(x, y, 2), fullgraph=True, backend="aot_eager")
    slopes = torch.autograd.grad(compiled(x, y).sum(), (x, y))
    assert calls
    for slope, expected in zip(slopes, torch.autograd.grad(_plain(x, y, 2).sum(), (x, y)), strict=True):
        torch.testing.assert_close(slope, expected)


def test_export_of_an_implementation_that_is_not_traced_holds_the_definition_alone() -> None:
    operator, calls = _operator("exported", traced=False)

    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return operator(x, None, 2)

    program = torch.export.export(Module(), (_arguments()[0].detach(),))
    assert not calls
    assert all("sluice" not in str(node.target) for node in program.graph.nodes)


def test_whoever_counts_operations_sees_the_definition() -> None:
    """A fast way multiplies in ways that a counter knows nothing of."""
    from torch.utils.flop_counter import FlopCounterMode

    own = Implementation("own", "cpu", lambda x: True, lambda x: (x + 1,), lambda gradient, x: (gradient,))
    operator = Operator("counted_example", lambda x: x @ x, "Tensor x", (own,))
    with FlopCounterMode(display=False) as counter:
        operator(torch.ones(3, 3))
    assert counter.get_total_flops() == 54
    assert operator.chosen(torch.ones(3, 3)) == "own"
