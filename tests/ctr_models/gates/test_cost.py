from __future__ import annotations

from ctr_models.gates import GATES
from ctr_models.gates.cost import Cost, cost
from ctr_models.gates.probe import Case, Sizes, cases


def test_a_linear_gate_by_hand() -> None:
    # W is 7 by 5: 70 operations for the product, 7 for the sigmoid, 7 for x times the mask.
    sizes = Sizes(width=7, context=5)
    assert cost(Case("sigmoid", "fusion", True), sizes) == Cost(parameters=35, flops=84)
    # A bias is part of the product; 1 + sigmoid is 7 more.
    assert cost(Case("cross_stream", "fusion", True), sizes) == Cost(parameters=35, flops=91)


def test_what_is_computed_once_a_batch_is_left_out() -> None:
    alone = cost(Case("sigmoid2", "feature", False), Sizes(width=7))
    assert alone.parameters == 16 + 16 * 64 + 64 + 64 * 7 + 7
    assert alone.flops == 7  # x times a mask that is the same for every row


def test_a_history_costs_by_its_length() -> None:
    case = Case("linear_attention", "sequence", True)
    short, long = (cost(case, Sizes(history=n, even=True)).flops for n in (10, 20))
    assert 1.8 < long / short < 2.05


def test_the_control_costs_nothing_and_no_gate_less() -> None:
    for case in cases("none"):
        assert cost(case) == Cost(parameters=0, flops=0)
    assert all(cost(case).flops > 0 for name in GATES if name != "none" for case in cases(name))
