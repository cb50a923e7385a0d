"""The clauses of the contract that are asked in some slots only."""

from __future__ import annotations

import torch
from torch import nn

from ctr_models.gates.base import Gate
from ctr_models.gates.clauses import clause, expect, fail, same
from ctr_models.gates.probe import Case, Sizes, inputs
from ctr_models.gates.recall import recall_of
from ctr_models.gates.selection import SelectionGate


@clause(
    "one context",
    "let a context of one row, (1, C), broadcast over all rows",
    applies=lambda case: case.context and case.slot in ("feature", "field"),
)
def takes_one_context_for_all_rows(case: Case) -> None:
    """A context (1, C) is as good as B equal ones."""
    gate = case.gate(stirred=True).eval()
    x, context = inputs(case, gate)
    every = context[:1].expand_as(context)
    same(gate.gated(x, context[:1]), gate.gated(x, every), "one context for all rows differs from equal ones")


@clause(
    "by context",
    "let by_context be True only where forward never reads x",
    applies=lambda case: case.slot in ("feature", "field"),
)
def keeps_x_out_of_a_mask_by_context(case: Case) -> None:
    """A gate that says so has the same mask for any x: candidates of one context are given one."""
    gate = case.gate(stirred=True).eval()
    x, *context = inputs(case, gate)
    if gate.by_context:
        same(gate(x + 1, *context), gate(x, *context), "by_context is True, and the mask depends on x")


@clause(
    "widths",
    "size layers by shape.context and shape.width, so that other widths are errors",
    applies=lambda case: case.context and case.slot in ("feature", "field", "cross", "fusion", "selection"),
)
def refuses_other_widths(case: Case) -> None:
    """A context of another width than it was built for is an error, not a broadcast."""
    gate = case.gate(stirred=True).eval()
    x, context = inputs(case, gate)
    if torch.equal(gate(x, context), gate(x, context + 1)):
        return  # it does not look at the context
    try:
        gate.gated(x, torch.cat([context, context], dim=1))
    except RuntimeError:
        return
    fail("a context twice as wide as it was built for is accepted")


@clause(
    "cross layers",
    "let cross and cross_network give what those of Gate make of the mask, or leave them as they are",
    applies=lambda case: case.slot == "cross" and case.context,
)
def crosses_by_its_mask(case: Case) -> None:
    """A cross layer, and two of them at once, are what the masks make of them."""
    sizes = Sizes(width=6, context=6)  # the layer's own input is the context
    gates = [case.gate(sizes, seed=seed, stirred=True).eval() for seed in (0, 1)]
    torch.manual_seed(2)
    layers, c0 = [nn.Linear(sizes.width, sizes.width) for _ in gates], torch.randn(sizes.rows, sizes.width)
    first = Gate.cross(gates[0], c0, c0, layers[0])
    same(gates[0].cross(c0, c0, layers[0]), first, "cross is not c0 * gated(W c + b) + c", rtol=1e-4)
    found, second = gates[0].cross_network(c0, gates, layers), Gate.cross(gates[1], c0, first, layers[1])
    same(found, second, "cross_network is not one layer after the other", rtol=1e-4)


@clause(
    "absent keys",
    "mask the weights with scores.isneginf(), or build on Gate.attend",
    applies=lambda case: case.slot == "attention",
)
def gives_absent_keys_nothing(case: Case) -> None:
    """Weights are in [0, 1], 0 where a key is absent, even where all are, and the same with more absent keys."""
    gate = case.gate(stirred=True).eval()
    scores, absent, _, x = inputs(case, gate)
    absent[1] = True
    scores = scores.masked_fill(absent, -torch.inf).requires_grad_()
    weights = gate.attend(scores, x.requires_grad_())
    expect(weights.shape == scores.shape, f"weights {tuple(weights.shape)} of scores {tuple(scores.shape)}")
    expect((weights.masked_select(absent.expand_as(weights)) == 0).all(), "an absent key gets a weight")
    expect(weights.min() >= 0 and weights.max() <= 1, "a weight is outside of [0, 1]")
    weights.square().sum().backward()
    finite = all(v.grad is None or v.grad.isfinite().all() for v in (scores, x))
    expect(finite, "gradients are not finite where all keys are absent")
    wider = torch.cat([scores, torch.full_like(scores, -torch.inf)], dim=3)
    both = torch.cat([weights, torch.zeros_like(weights)], dim=3)
    same(gate.attend(wider, x), both, "with more absent keys the weights of the others differ")


@clause(
    "offsets",
    "let offsets keep their dtype: histories come with int32 from TorchRec",
    applies=lambda case: case.slot == "sequence" or (case.slot == "expert" and case.context),
)
def takes_offsets_of_either_width(case: Case) -> None:
    """Offsets of int32 are as good as those of int64."""
    use = case.use(stirred=True).eval()
    given = inputs(case, use.gate)
    narrow = tuple(v if v.is_floating_point() else v.int() for v in given)
    expect(torch.equal(use(*narrow), use(*given)), "with offsets of int32 it differs")


@clause(
    "recall",
    "let pool compare the query with the behaviours; or leave recalls at False",
    scope="slot",
    applies=lambda case: case.slot == "sequence" and case.type.recalls,
)
def has_the_recall_it_claims(case: Case) -> None:
    """Trained for some seconds on multi-query associative recall, it is right in more than 95 of 100 cases."""
    torch.manual_seed(0)
    right = recall_of(case.gate(Sizes(dim=32)))
    expect(right > 0.95, f"it recalls {right:.0%} of the values")


@clause(
    "hardened",
    "let harden end draws and price: a mask above 0 for just what kept says; that it ended belongs in a buffer",
    applies=lambda case: case.slot == "selection" and issubclass(case.type, SelectionGate),
)
def ends_its_search(case: Case) -> None:
    """Hardened, a value's mask depends on its logit alone, is above 0 where it is kept, is free, and is saved."""
    gate, fresh = case.gate(), case.gate(seed=1)
    assert isinstance(gate, SelectionGate)  # for mypy, as the next
    assert isinstance(fresh, SelectionGate)
    gate.harden()
    fresh.load_state_dict(gate.state_dict())
    logits = torch.linspace(-8, 8, 40).view(8, 5)
    kept, expected = gate.kept(logits), gate.eval().mask(logits)
    expect(expected.min() >= 0 and torch.equal(expected > 0, kept), "masks are not above 0 for just what is kept")
    same(gate.mask(logits.flip(0, 1)), expected.flip(0, 1), "a value's mask depends on the logits of others")
    same(fresh.eval().mask(logits), expected, "a gate loaded from saved weights has not hardened")
    same(gate.train().mask(logits), expected, "in training, masks are others")
    expect(gate.value_penalty(logits) == 0, "values still have a price")
