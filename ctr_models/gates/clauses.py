"""The clauses of the contract, each a function of a gate's name or of a case that raises AssertionError."""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, TypeGuard

import torch
from safetensors.torch import load, save
from torch import Tensor

from ctr_models.errors import ConfigError
from ctr_models.gates.base import GATES, SLOTS, Gate, GateConfig, GateSpec
from ctr_models.gates.probe import MASKED, WEIGHING, Case, Sizes, Use, cases, dynamic, inputs, row
from ctr_models.gates.selection import SelectionGate


@dataclass(frozen=True)
class Check:
    """One clause of the contract.

    Args:
        name: what holds, in a word or two.
        scope: whether it is asked once a gate, once a gate and slot, or once a case.
        remedy: what to do when it does not hold.
        run: the function; it takes a gate's name with scope ``gate``, a case otherwise.
        applies: the cases for which there is something to check.
    """

    name: str
    scope: Literal["gate", "slot", "case"]
    remedy: str
    run: Callable[[Any], None]
    applies: Callable[[Case], bool]

    def subjects(self, name: str) -> list[str] | list[Case]:
        """Return what the check is called with for this gate."""
        if self.scope == "gate":
            return [name]
        found = [case for case in cases(name) if self.applies(case)]
        return list({case.slot: case for case in found}.values()) if self.scope == "slot" else found


CHECKS: list[Check] = []


def clause(
    name: str,
    remedy: str,
    *,
    scope: Literal["gate", "slot", "case"] = "case",
    applies: Callable[[Case], bool] = lambda case: True,
) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    def decorate(function: Callable[[Any], None]) -> Callable[[Any], None]:
        CHECKS.append(Check(name, scope, remedy, function, applies))
        return function

    return decorate


def fail(message: str) -> NoReturn:
    raise AssertionError(message)


def expect(condition: bool | Tensor, message: str) -> None:
    if not condition:
        fail(message)


def same(found: Tensor, expected: Tensor, what: str, *, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol, msg=lambda text: f"{what}. {text}")


def _loss(use: Use, given: tuple[Tensor, ...], out: Tensor) -> Tensor:
    torch.manual_seed(3)
    price = use.gate.penalty()
    expect(price.shape == (), f"a penalty of shape {tuple(price.shape)}, which is no scalar")
    loss = (out * torch.randn(out.shape, dtype=out.dtype)).float().sum() + price
    if selects(use.gate):
        loss = loss + use.gate.value_penalty(given[1])
    return loss


def selects(gate: Gate) -> TypeGuard[SelectionGate]:
    return isinstance(gate, SelectionGate) and gate.shape.slot == "selection"


@clause(
    "declared", "set slots to a frozenset of slot names, Config to a class derived from GateConfig", scope="gate"
)
def is_declared(name: str) -> None:
    """The class says where it fits and what its settings are."""
    gate = GATES[name]
    expect(isinstance(gate.slots, Set), f"slots is {gate.slots!r}, which is no set")
    expect(bool(gate.slots), "it lists no slot")
    unknown = sorted(gate.slots - set(SLOTS))
    expect(not unknown, f"there are no slots {unknown}; there are {list(SLOTS)}")
    expect(issubclass(gate.Config, GateConfig), f"its Config, {gate.Config}, does not derive from GateConfig")
    expect(gate.floor <= 1 <= gate.bound, f"its range [{gate.floor}, {gate.bound}] leaves 1, the identity, out")


@clause("options", "let Config derive from GateConfig and keep its model_config", scope="gate")
def refuses_unknown_options(name: str) -> None:
    """An option that it does not have is an error that names the nearest."""
    try:
        GateSpec.parse({"name": name, "strat": "paper"})
    except ConfigError as error:
        expect("'start'" in str(error), f"the error for option 'strat' does not name 'start': {error}")
    else:
        fail("it accepts an option 'strat', which is 'start' misspelt")


@clause("hash", "keep settings in the fields of Config, where the hash sees them", scope="gate")
def tells_settings_apart(name: str) -> None:
    """The hash depends on the settings, not on whether defaults are written out."""
    default = GATES[name].Config.model_fields["start"].default
    plain, written = GateSpec(name=name), GateSpec.parse({"name": name, "start": default})
    expect(plain.hash == written.hash, "a default written out changes the hash")
    if default != "identity" and cases(name) and cases(name)[0].claims_identity:
        other = GateSpec.parse({"name": name, "start": "identity"}).hash
        expect(plain.hash != other, "start: identity has the hash of start: paper")


@clause("other slots", "list the slot in slots, or leave GateSpec.build as it is", scope="gate")
def refuses_other_slots(name: str) -> None:
    """A slot that it does not list is refused."""
    for slot in set(SLOTS) - GATES[name].slots:
        try:
            Case(name, slot, False).gate()
        except ConfigError as error:
            expect(slot in str(error), f"the error for slot {slot!r} does not name it: {error}")
        else:
            fail(f"it can be built for slot {slot!r}, which it does not list")


@clause("built", "take (config, shape) in __init__, pass both to super().__init__, and give every option a default")
def is_built(case: Case) -> None:
    """It can be made with its default settings."""
    case.gate()


@clause("shape", "return a mask that broadcasts to x, of its dtype; see the table in Gate.forward")
def has_the_right_shape(case: Case) -> None:
    """Shape and dtype are what the slot asks for, gated is x times the mask, and inputs stay as they are."""
    use = case.use()
    given = inputs(case, use.gate)
    copies, expected = [v.clone() for v in given], case.control()(*given)
    x, *context = given[2:] if case.slot == "attention" else given
    if case.masks:
        mask = use.gate(x, *context)
        try:
            fits = torch.broadcast_shapes(mask.shape, x.shape) == x.shape
        except RuntimeError:
            fits = False
        expect(fits, f"a mask {tuple(mask.shape)} does not broadcast to x {tuple(x.shape)}")
    for mode in (True, False):
        out = use.train(mode)(*given)
        if case.slot == "depth":
            out = out.expand(given[0].shape[0], 1)
            expected = expected.expand_as(out)
        expect(out.shape == expected.shape, f"shape {tuple(out.shape)}, expected {tuple(expected.shape)}")
        expect(out.dtype == torch.float32, f"dtype {out.dtype} for inputs of float32")
        expect(out.isfinite().all(), "not all values are finite")
    expect(all(map(torch.equal, given, copies)), "it changes its inputs in place, which others read too")
    if case.masks:
        torch.manual_seed(2)
        gated = use.gate.gated(x, *context)
        torch.manual_seed(2)
        same(gated, x * use.gate(x, *context), "gated(x) is not x times the mask")


@clause(
    "range",
    "keep the mask in [floor, bound], or set them to its range; set simplex = False if weights are no shares",
    applies=lambda case: case.masks or case.slot in (*WEIGHING, "depth"),
)
def stays_in_its_range(case: Case) -> None:
    """For any parameters and inputs masks are in [floor, bound], shares add up to 1, a probability is in [0, 1]."""
    starts: list[dict[str, Any]] = [{}, {"start": "identity"}] if case.claims_identity else [{}]
    for options in starts:
        use = case.use(stirred=True, **options)
        given = inputs(case, use.gate)
        for mode in (True, False):
            use.train(mode)
            for scale in (1.0, 100.0):
                scaled = tuple(scale * v if v.is_floating_point() else v for v in given)
                if case.masks:
                    out = use.gate(*(scaled[2:] if case.slot == "attention" else scaled))
                else:
                    out = use(*scaled)
                low, high = out.detach().min().item(), out.detach().max().item()
                if case.slot in WEIGHING:
                    if use.gate.simplex:
                        expect(low >= 0, f"a weight is {low}")
                        same(out.sum(1), torch.ones(len(out)), "the weights of a row do not add up to 1")
                    continue
                floor, bound = (0.0, 1.0) if case.slot == "depth" else (use.gate.floor, use.gate.bound)
                inside = low >= floor and high <= bound * (1 + 1e-6)  # the bound may not be a float32
                expect(inside, f"values in [{low}, {high}], outside of [{floor}, {bound}]")


@clause(
    "gradients",
    "every parameter must take part in forward (or the slot's hook); look for a ReLU that is never open, and for "
    "products of two factors that both start at 0",
)
def gradients_reach_every_parameter(case: Case) -> None:
    """Parameters, x and the context get a finite gradient, not 0 throughout, early in training or half-way."""
    use = case.use().train()
    given = tuple(v.requires_grad_() if v.is_floating_point() else v for v in inputs(case, use.gate))
    torch.manual_seed(2)
    for done in (0.0, 0.5):
        use.gate.anneal(done)
        out = use(*given)
        if not out.requires_grad:
            expect(not list(use.parameters()), "the result does not depend on the parameters")
            return
        _loss(use, given, out).backward()
    asked = [(f"parameter {path.removeprefix('gate.')}", p) for path, p in use.named_parameters()]
    if case.slot in MASKED and case.slot != "attention":
        asked.append(("x", given[0]))
    if case.slot in ("feature", "field") and case.context:
        asked.append(("the context", given[1]))
    if selects(use.gate):
        asked.append(("the logits", given[1]))
    for what, value in asked:
        expect(value.grad is not None, f"{what} gets no gradient")
    asked += [(f"input {i}", v) for i, v in enumerate(given) if v.grad is not None]
    for what, value in asked:
        assert value.grad is not None  # for mypy; asked above
        expect(value.grad.isfinite().all(), f"the gradient of {what} is not finite")
        expect(value.grad.abs().max() > 0, f"the gradient of {what} is 0 throughout")


@clause("derivative", "make forward differentiable; a custom autograd Function needs a right backward")
def gradients_are_right(case: Case) -> None:
    """In evaluation and in float64, gradients are those of finite differences."""
    sizes = Sizes(rows=3)
    use = case.use(sizes, stirred=True).double().eval()
    given = inputs(case, use.gate, sizes, dtype=torch.float64)
    floating = [i for i, v in enumerate(given) if v.is_floating_point()]
    names = [name for name, _ in use.named_parameters()]

    def out(*values: Tensor) -> Tensor:
        all_inputs = list(given)
        for i, value in zip(floating, values, strict=False):
            all_inputs[i] = value
        state = dict(zip(names, values[len(floating) :], strict=True))
        return torch.func.functional_call(use, state, tuple(all_inputs))

    values = [given[i].clone().requires_grad_() for i in floating]
    values += [p.detach().clone().requires_grad_() for p in use.parameters()]
    if not out(*values).requires_grad:
        return
    try:
        torch.autograd.gradcheck(out, values)
    except RuntimeError as error:  # of which GradcheckError is one
        raise AssertionError(str(error)) from None


@clause(
    "identity",
    "with start: identity let the mask be 1 (weights and pooling those of gate none), and leave a way to learn: at "
    "most one of two factors may start at 0. A gate that can't narrows start to Literal['paper']",
    applies=lambda case: case.claims_identity,
)
def starts_as_the_identity(case: Case) -> None:
    """With start: identity it is the control before training, to 1e-6, and every parameter can learn."""
    use = case.use(start="identity")
    given = inputs(case, use.gate)
    if case.slot == "selection":
        given = (given[0], torch.full_like(given[1], getattr(use.gate, "initial_logit", 0.0)))
    found, control = use.eval()(*given), case.control()(*given)
    if case.slot == "depth":
        expect(((found > 0.5) == (control > 0.5)).all(), "a row is not sent on as gate none sends it on")
    else:
        same(found, control, "it differs from gate none", rtol=0, atol=1e-6)
    target = torch.randn(found.shape, generator=torch.Generator().manual_seed(4))
    use.train()
    for _ in range(3):
        use.zero_grad()
        out = use(*given)
        if out.requires_grad:
            ((out - target) ** 2).mean().backward()
        with torch.no_grad():
            for parameter in use.parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
    for path, parameter in use.named_parameters():
        learns = parameter.grad is not None and bool(parameter.grad.abs().max() > 0)
        expect(learns, f"parameter {path.removeprefix('gate.')} gets no gradient in three steps from there")


@clause("seed", "draw from torch's global generator alone, and in evaluation not at all")
def is_reproducible(case: Case) -> None:
    """One seed makes one gate and its draws in training, and evaluation draws nothing."""
    first, second = case.use(stirred=True).eval(), case.use(stirred=True).eval()
    given = inputs(case, first.gate)
    found = first(*given)
    expect(torch.equal(found, first(*given)), "a second call gives another result")
    expect(torch.equal(found, second(*given)), "two gates of one seed differ")
    drawn = []
    for use in (first, second):
        torch.manual_seed(5)
        drawn.append(use.train()(*given))
    expect(torch.equal(*drawn), "in training, one seed gives two results")


@clause("neighbours", "reduce over fields and coordinates, never over rows")
def ignores_its_neighbours(case: Case) -> None:
    """In evaluation a row's result does not depend on the other rows."""
    use = case.use(stirred=True).double().eval()
    given = inputs(case, use.gate, dtype=torch.float64)
    together = use(*given)
    rows = given[-1].shape[0]
    alone = torch.cat([use(*row(case, given, i)).expand(1, *together.shape[1:]) for i in range(rows)])
    same(together.expand_as(alone), alone, "a row alone differs from the row in a batch")


@clause(
    "saved",
    "hold what training changes in parameters and registered buffers, and register all of them in __init__",
)
def survives_saving(case: Case) -> None:
    """Saved in the midst of training and loaded into a fresh gate, it gives the same results."""
    use, fresh = case.use(stirred=True), case.use(seed=1, stirred=True)
    given, entries = inputs(case, use.gate), set(use.state_dict())
    use.gate.anneal(0.7)
    use.train()(*given)
    expect(set(use.state_dict()) == entries, "training changes the entries of the state dict")
    fresh.load_state_dict(load(save({k: v.contiguous() for k, v in use.state_dict().items()})))
    expect(torch.equal(use.eval()(*given), fresh.eval()(*given)), "a gate loaded from saved weights differs")
    use.gate.anneal(1.0)
    expect(use.train()(*given).isfinite().all(), "annealed to the end, it gives values that are not finite")


@clause("missing values", "mind divisions and logarithms where all is 0, a history is empty, no key is present")
def survives_missing_values(case: Case) -> None:
    """Zeros, empty histories and absent keys give finite results and gradients."""
    use = case.use().train()
    given = tuple(torch.zeros_like(v) if v.is_floating_point() else v for v in inputs(case, use.gate))
    if case.slot == "attention":
        given = (given[0], torch.ones_like(given[1]), *given[2:])
    elif case.slot == "sequence":
        given = (given[0][:0], given[1][:0], torch.zeros_like(given[2]), given[3])
    elif case.slot == "expert" and case.context:
        given = (given[0], given[1][:0], torch.zeros_like(given[2]), given[3])
    given = tuple(v.requires_grad_() if v.is_floating_point() else v for v in given)
    out = use(*given)
    expect(out.isfinite().all(), "not all values are finite")
    if out.requires_grad:
        _loss(use, given, out).backward()
    finite = all(v.grad is None or v.grad.isfinite().all() for v in (*use.parameters(), *given))
    expect(finite, "not all gradients, of parameters and inputs, are finite")
    if case.slot == "sequence":
        expect((out == 0).all(), "an empty history does not pool to zeros")


@clause("half precision", "keep long sums, ages and logarithms in float32, and results in the dtype of x")
def is_near_in_half_precision(case: Case) -> None:
    """In bfloat16 it is within 0.05 of float32, and under autocast gradients are finite."""
    use = case.use()
    given = inputs(case, use.gate)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = use.train()(*given)
        loss = _loss(use, given, out)
    if loss.requires_grad:
        loss.backward()
    finite = all(p.grad is None or p.grad.isfinite().all() for p in use.parameters())
    expect(finite, "under autocast not all gradients are finite")
    exact = use.eval()(*given).detach()
    rough = use.bfloat16()(*(v.bfloat16() if v.is_floating_point() else v for v in given))
    expect(rough.dtype == torch.bfloat16, f"dtype {rough.dtype} for inputs of bfloat16")
    same(rough.float(), exact, "bfloat16 is far from float32", rtol=0.05, atol=0.05)


@clause("telemetry", "let penalty return a finite scalar, and telemetry finite numbers that keep the four of Gate")
def tells_of_itself(case: Case) -> None:
    """The penalty is a finite scalar, and telemetry holds finite numbers."""
    use = case.use().train()
    given = inputs(case, use.gate)
    out = use(*given)
    penalty = use.gate.penalty()
    expect(penalty.shape == (), f"a penalty of shape {tuple(penalty.shape)}, which is no scalar")
    expect(penalty.isfinite(), f"a penalty of {penalty.item()}")
    if selects(use.gate):
        price = use.gate.value_penalty(given[1])
        expect(price.shape == () and price.isfinite(), "value_penalty is not a finite scalar")
    if case.masks:
        out = use.gate(*(given[2:] if case.slot == "attention" else given))
    elif case.slot not in (*WEIGHING, "depth"):
        return
    told = use.gate.telemetry(out)
    missing = {"mean", "std", "saturation", "entropy"} - set(told)
    expect(not missing, f"telemetry leaves out {sorted(missing)}")
    infinite = [key for key, value in told.items() if not abs(value) < float("inf")]
    expect(not infinite, f"telemetry is not finite: {infinite}")


@clause(
    "exported",
    "take decisions with torch.where, not with Python's if on a tensor, and don't loop over rows",
    scope="slot",
)
def is_the_same_exported(case: Case) -> None:
    """torch.export's program gives the same results, for any number of rows."""
    use = case.use(stirred=True).eval()
    given, other = inputs(case, use.gate), inputs(case, use.gate, Sizes(rows=3, history=9))
    program = torch.export.export(use, given, dynamic_shapes=(dynamic(case),)).module()
    for values in (given, other):
        same(program(*values), use(*values), "the exported program differs")


@clause(
    "compiled", "avoid what breaks the graph: prints, numbers taken out of tensors, ifs on values", scope="gate"
)
def is_the_same_compiled(name: str) -> None:
    """torch.compile makes one graph of it, with the same results."""
    torch._dynamo.reset()
    case = cases(name)[-1]
    use = case.use(stirred=True).eval()
    given = inputs(case, use.gate)
    compiled = torch.compile(use, fullgraph=True)
    same(compiled(*given), use(*given), "compiled it differs", rtol=1e-4, atol=1e-4)
