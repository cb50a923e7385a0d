"""The contract itself: each clause is broken by a gate that breaks it, and says so."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from ctr_models.gates import Gate, GateConfig, GateShape, NoGate, SelectionGate, register_gate
from ctr_models.gates.base import present_softmax
from ctr_models.gates.context import ContextConfig
from ctr_models.gates.contract import CHECKS, Result, run
from ctr_models.gates.probe import Case

SLOW = ("compiled", "exported")
ALL_BUT_EXPORT = tuple(check.name for check in CHECKS if check.name != "exported")
GENERATOR = torch.Generator().manual_seed(0)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


class Free(Gate):
    """A gate that holds everything, for others to break."""

    slots, bound = frozenset({"feature"}), 2.0

    def __init__(self, config: GateConfig, shape: GateShape) -> None:
        super().__init__(config, shape)
        self.v = nn.Parameter(torch.zeros(1, shape.width))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return 2 * torch.sigmoid(self.v)


def broken(gate: type[Gate], *, skip: tuple[str, ...] = SLOW) -> dict[str, str]:
    """Return the clauses that a gate breaks, with the reasons."""
    register_gate(gate.__name__)(gate)
    results = run(gate.__name__, skip=skip)
    return {result.check.name: result.error for result in results if result.error is not None}


def test_a_good_gate_breaks_nothing() -> None:
    class Mine(Free):
        pass

    assert broken(Mine, skip=("compiled",)) == {}


def test_every_clause_has_a_name_a_sentence_and_a_remedy() -> None:
    assert len({check.name for check in CHECKS}) == len(CHECKS) >= 20
    for check in CHECKS:
        assert (check.run.__doc__ or "").endswith(".")
        assert len(check.remedy) > 20


def test_slots_that_there_are_not_are_told_once() -> None:
    class Mine(Free):
        slots = frozenset({"feture"})

    found = broken(Mine)
    assert "no slots ['feture']" in found.pop("declared")
    assert not found

    class Bare(Free):
        slots = "feature"  # type: ignore[assignment]

    assert broken(Bare) == {"declared": "slots is 'feature', which is no set"}


def test_a_gate_that_cannot_be_built_is_told_once() -> None:
    class Mine(Free):
        def __init__(self, config: GateConfig) -> None:  # type: ignore[misc]
            raise AssertionError

    found = broken(Mine)
    assert set(found) <= {"built", "other slots"}
    assert "TypeError" in found["built"]


def test_a_dead_parameter_and_a_dead_context() -> None:
    class Dead(Free):
        Config = ContextConfig

        def __init__(self, config: GateConfig, shape: GateShape) -> None:
            super().__init__(config, shape)
            self.hidden = nn.Linear(shape.context or shape.width, 3)
            nn.init.constant_(self.hidden.bias, -1e6)  # a ReLU that never opens

        def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
            hidden = torch.relu(self.hidden(x if context is None else context))
            return 2 * torch.sigmoid(self.v + hidden.sum(1, keepdim=True))

    assert "the gradient of parameter hidden.weight is 0 throughout" in broken(Dead)["gradients"]

    class Deaf(Free):
        Config = ContextConfig

    assert broken(Deaf)["gradients"] == "the context gets no gradient"


def test_a_mask_out_of_range_or_of_a_wrong_shape() -> None:
    class Loud(Free):
        def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
            return 1 + self.v

    assert "outside of [0.0, 2.0]" in broken(Loud)["range"]

    class Long(Free):
        def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
            return torch.cat([x, x], dim=1).sigmoid()

        def gated(self, x: Tensor, context: Tensor | None = None) -> Tensor:
            return x * 2 * torch.sigmoid(self.v)

    assert "does not broadcast to x (8, 6)" in broken(Long)["shape"]

    class Longer(Free):
        def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
            return torch.cat([x, x], dim=1).sigmoid()

    every = broken(Longer, skip=())
    assert list(every) == ["shape"]
    assert every["shape"] == "a mask (8, 12) does not broadcast to x (8, 6)"


def test_a_gate_without_forward() -> None:
    class Mine(Gate):
        slots = frozenset({"feature"})

    assert broken(Mine, skip=()) == {"shape": "NotImplementedError: gate Mine lacks a forward for slot 'feature'"}


def test_inputs_changed_in_place() -> None:
    class Mine(Free):
        def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
            mask = 2 * torch.sigmoid(self.v)
            x.data.mul_(1.5)
            return mask

    assert "changes its inputs in place" in broken(Mine)["shape"]


def test_a_fused_product_that_is_another() -> None:
    class Mine(Free):
        def gated(self, x: Tensor, context: Tensor | None = None) -> Tensor:
            return x * torch.sigmoid(self.v)

    assert "gated(x) is not x times the mask" in broken(Mine)["shape"]


def test_a_fused_cross_network_that_is_another() -> None:
    class Mine(NoGate):
        slots = frozenset({"cross"})

        def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
            return torch.sigmoid(x)

        def gated(self, x: Tensor, context: Tensor | None = None) -> Tensor:
            return x * self(x, context)

    assert "cross_network is not one layer after the other" in broken(Mine)["cross layers"]


def test_an_identity_that_is_none_or_cannot_learn() -> None:
    class Half(Free):
        def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
            return torch.sigmoid(self.v)

    assert "it differs from gate none" in broken(Half)["identity"]

    class Stuck(Free):
        def __init__(self, config: GateConfig, shape: GateShape) -> None:
            super().__init__(config, shape)
            self.w = nn.Parameter(torch.zeros(1, shape.width))
            if config.start == "paper":
                nn.init.normal_(self.w)
                nn.init.normal_(self.v)

        def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
            return 2 * torch.sigmoid(self.v * self.w)

    assert "gets no gradient in three steps" in broken(Stuck)["identity"]


def test_neighbours_that_matter() -> None:
    class Mine(Free):
        def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
            return 2 * torch.sigmoid(self.v * (x - x.mean(0)))

    assert "a row alone differs" in broken(Mine)["neighbours"]  # although v starts at 0, where no row does


def test_draws_in_evaluation() -> None:
    class Mine(Free):
        def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
            return 2 * torch.sigmoid(self.v + 0.1 * torch.rand_like(x))

    assert "a second call gives another result" in broken(Mine)["seed"]


def test_draws_from_another_generator() -> None:
    class Mine(Free):
        def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
            noise = torch.rand(x.shape, generator=GENERATOR) if self.training else 0.0
            return 2 * torch.sigmoid(self.v + 0.1 * noise)

    assert set(broken(Mine)) == {"seed"}


def test_statistics_of_training_outside_of_buffers() -> None:
    class Mine(Free):
        seen = 0.0

        def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
            if self.training:
                self.seen = 0.9 * self.seen + 0.1 * float(x.detach().mean())
            return 2 * torch.sigmoid(self.v * (x - self.seen))

    assert "a gate loaded from saved weights differs" in broken(Mine)["saved"]


def test_what_annealing_sets_outside_of_buffers() -> None:
    class Mine(Free):
        t = 1.0

        def anneal(self, done: float) -> None:
            self.t = 1 + done

        def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
            return 2 * torch.sigmoid(self.v + (self.t - 1) * x)

    assert "a gate loaded from saved weights differs" in broken(Mine)["saved"]


def test_a_wrong_derivative_and_half_precision() -> None:
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, v: Tensor) -> Tensor:
            return 2 * torch.sigmoid(v)

        @staticmethod
        def backward(ctx: object, gradient: Tensor) -> Tensor:
            return gradient

    class Mine(Free):
        def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
            return Twice.apply(self.v).float()

    found = broken(Mine)
    assert "Jacobian mismatch" in found["derivative"]
    assert "dtype" in found["half precision"]


def test_penalty_and_telemetry_that_are_not_finite() -> None:
    class Mine(Free):
        def penalty(self) -> Tensor:
            return self.v.sum() / 0

        def telemetry(self, mask: Tensor) -> dict[str, float]:
            return {"mean": 1.0}

    assert "a penalty of nan" in broken(Mine)["telemetry"]

    class Short(Free):
        def telemetry(self, mask: Tensor) -> dict[str, float]:
            return {"mean": 1.0}

    assert "leaves out ['entropy', 'saturation', 'std']" in broken(Short)["telemetry"]


def test_rows_of_zeros_and_absent_keys() -> None:
    class Normed(Free):
        def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
            return torch.sigmoid(self.v + x / x.norm(dim=1, keepdim=True))

    assert "not all values are finite" in broken(Normed)["missing values"]

    class Rooted(Free):
        def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
            return 2 * torch.sigmoid(self.v * x.square().sum(1, keepdim=True).sqrt())

    assert "not all gradients, of parameters and inputs" in broken(Rooted)["missing values"]

    class Attentive(Gate):
        slots = frozenset({"attention"})

        def attend(self, scores: Tensor, query: Tensor) -> Tensor:
            return present_softmax(scores.clamp_min(-1))

        def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
            return torch.ones_like(x)

    assert broken(Attentive)["absent keys"] == "an absent key gets a weight"

    class Padded(Gate):
        slots = frozenset({"attention"})

        def attend(self, scores: Tensor, query: Tensor) -> Tensor:
            return present_softmax(scores * 5 / scores.shape[-1])

        def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
            return torch.ones_like(x)

    assert "with more absent keys the weights" in broken(Padded)["absent keys"]

    class Plain(Gate):
        slots = frozenset({"attention"})

        def attend(self, scores: Tensor, query: Tensor) -> Tensor:
            return scores.softmax(-1).nan_to_num(0.0)

        def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
            return torch.ones_like(x)

    assert "gradients are not finite where all keys are absent" in broken(Plain)["absent keys"]


def test_an_empty_history_that_pools_to_something() -> None:
    class Mine(Gate):
        slots = frozenset({"sequence"})

        def pool(self, values: Tensor, scores: Tensor, offsets: Tensor, query: Tensor) -> Tensor:
            return super().pool(values, scores, offsets, query) + 1

    assert broken(Mine)["missing values"] == "an empty history does not pool to zeros"


def test_offsets_of_one_width_only() -> None:
    class Mine(Gate):
        slots = frozenset({"sequence"})

        def pool(self, values: Tensor, scores: Tensor, offsets: Tensor, query: Tensor) -> Tensor:
            return super().pool(values, scores, offsets.view(torch.int64), query)

    assert "offsets" in broken(Mine)


def test_weights_that_are_no_shares() -> None:
    class Mine(Gate):
        slots = frozenset({"interaction"})

        def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
            return torch.sigmoid(x)

    assert "do not add up to 1" in broken(Mine)["range"]


class Selecting(SelectionGate):
    """A selection that holds everything, for others to break."""

    initial_logit = 9.0
    bound = 1 + 2e-4

    def __init__(self, config: GateConfig, shape: GateShape) -> None:
        super().__init__(config, shape)
        self.register_buffer("hardened", torch.tensor(False))

    def mask(self, logits: Tensor) -> Tensor:
        soft = torch.sigmoid(logits) / torch.sigmoid(torch.tensor(9.0))
        return torch.where(self.hardened, self.kept(logits).to(soft.dtype), soft).to(logits.dtype)

    def kept(self, logits: Tensor) -> Tensor:
        return logits > 0


def test_a_selection_that_does_not_end_its_search() -> None:
    def hardened(gate: type[Gate]) -> str:
        return broken(gate)["hardened"]

    class Endless(Selecting):
        def harden(self) -> None:
            pass

    assert hardened(Endless) == "masks are not above 0 for just what is kept"

    class Unsaved(Selecting):
        def harden(self) -> None:
            self.hardened = torch.tensor(True)

        def __init__(self, config: GateConfig, shape: GateShape) -> None:
            super().__init__(config, shape)
            del self.hardened
            self.hardened = torch.tensor(False)

    assert "has not hardened" in hardened(Unsaved)

    class Mixing(Selecting):
        def mask(self, logits: Tensor) -> Tensor:
            return super().mask(logits) * (1 + logits[:, :1].sigmoid())

    assert "depends on the logits of others" in hardened(Mixing)

    class Dear(Selecting):
        def value_penalty(self, logits: Tensor) -> Tensor:
            return logits.sigmoid().sum()

    assert broken(Dear) == {"hardened": "values still have a price"}

    class Deaf(Selecting):
        def mask(self, logits: Tensor) -> Tensor:
            return super().mask(logits.detach())

    assert broken(Deaf)["gradients"] == "the logits gets no gradient"


def test_a_penalty_that_is_no_scalar() -> None:
    class Mine(Free):
        def penalty(self) -> Tensor:
            return self.v[0]

    assert set(broken(Mine).values()) == {"a penalty of shape (6,), which is no scalar"}


def test_a_selection_that_prices_without_end() -> None:
    class Mine(SelectionGate):
        def __init__(self, config: GateConfig, shape: GateShape) -> None:
            super().__init__(config, shape)
            self.register_buffer("hardened", torch.tensor(False))

        def mask(self, logits: Tensor) -> Tensor:
            return torch.sigmoid(logits) * 0 + 1

        def kept(self, logits: Tensor) -> Tensor:
            return logits > 0

        def value_penalty(self, logits: Tensor) -> Tensor:
            return (logits / 0).sum()

    assert "value_penalty is not a finite scalar" in broken(Mine)["telemetry"]


def test_a_decision_on_values_breaks_the_graph() -> None:
    class Mine(Free):
        def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
            return 2 * torch.sigmoid(self.v if float(x.sum()) > 0 else -self.v)

    assert list(broken(Mine, skip=ALL_BUT_EXPORT)) == ["exported"]


def test_a_loop_over_rows_is_exported_for_one_number_of_them() -> None:
    class Mine(Free):
        def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
            return torch.stack([2 * torch.sigmoid(self.v[0] * row) for row in x])

    assert list(broken(Mine, skip=ALL_BUT_EXPORT)) == ["exported"]


def test_checks_are_counted_by_gate_slot_and_case() -> None:
    by_name = {check.name: check for check in CHECKS}
    assert by_name["compiled"].subjects("sigmoid") == ["sigmoid"]
    assert [str(case) for case in by_name["exported"].subjects("sigmoid")] == [
        "sigmoid-attention-context",
        "sigmoid-cross-context",
        "sigmoid-fusion-context",
    ]
    assert len(by_name["shape"].subjects("sigmoid")) == 5
    assert by_name["absent keys"].subjects("sigmoid2") == []
    results: Iterator[Result] = run("none", skip=SLOW)
    assert next(results).subject == "none"
    assert any(result.subject == Case("none", "expert", True) for result in results)
