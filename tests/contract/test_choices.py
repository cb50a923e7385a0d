"""What gates of slots ``expert`` and ``interaction`` hold beyond the contract. Nothing here knows one by name."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ctr_models.gates import GATES, Gate
from ctr_models.gates.probe import WEIGHING, Case, Sizes, cases, inputs

SIZES = Sizes(rows=12, width=6, context=4, choices=5)
CASES = [case for name in GATES for case in cases(name) if case.slot in WEIGHING]
LOOKS_AT_HISTORIES = {name for name in GATES if GATES[name].mixture is not Gate.mixture}
cases_of_choice = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@cases_of_choice
def test_telemetry_tells_of_every_choice(case: Case) -> None:
    use = case.use(SIZES).eval()
    weights = use(*inputs(case, use.gate, SIZES))
    told = use.gate.telemetry(weights)
    assert {"zeros", "importance"} <= set(told)
    means = torch.tensor([told[f"choice_{k}"] for k in range(5)])
    torch.testing.assert_close(means, weights.mean(0).detach())
    assert told["zeros"] == pytest.approx((weights == 0).float().mean().item())


@cases_of_choice
def test_a_row_does_not_depend_on_the_number_of_rows(case: Case) -> None:
    """Sparse gates sort, and noisy ones sum over the batch: in evaluation neither may show."""
    use, twice = case.use(SIZES).eval(), Sizes(rows=24, width=6, context=4, choices=5)
    if case.slot == "expert" and case.context:
        return  # lengths of histories depend on the number of rows; the contract takes rows one by one
    given = inputs(case, use.gate, twice)
    torch.testing.assert_close(use(*given)[:12], use(*(v[:12] for v in given)), rtol=1e-5, atol=1e-6)


@cases_of_choice
def test_traced_it_trains(case: Case) -> None:
    """With dynamo, noise and penalty are those of the plain gate."""
    torch._dynamo.reset()
    use = case.use(SIZES).train()
    given = inputs(case, use.gate, SIZES)
    traced = torch.compile(use, backend="eager", fullgraph=True)
    torch.manual_seed(2)
    expected, price = use(*given), use.gate.penalty()
    torch.manual_seed(2)
    torch.testing.assert_close(traced(*given), expected)
    torch.testing.assert_close(use.gate.penalty(), price)


def populations(case: Case, rows: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """Return inputs that say which of five populations a row belongs to, in the history if there is one."""
    sizes = Sizes(rows=rows, width=5, context=5, choices=5)
    population = torch.arange(rows) % 5
    signal = torch.eye(5)[population] * 2
    if case.slot == "interaction":
        return (torch.nn.Parameter(torch.zeros(rows, 5)),), population
    if not case.context:
        return (signal + 0.1 * torch.randn(rows, 5),), population
    x, _, _, query = inputs(case, case.gate(sizes), sizes)
    lengths = torch.arange(rows) % 3 + 1
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    return (x, signal.repeat_interleave(lengths, 0), offsets, query), population


@pytest.mark.parametrize(
    "case",
    [c for c in CASES if c.name != "none" and (c.name in LOOKS_AT_HISTORIES or not c.context)],
    ids=str,
)
def test_it_learns_which_expert_is_right_for_whom(case: Case) -> None:
    """Each population has one expert that is right. With equal weights the squared error is 0.8 a row.

    A gate that sorts without noise never tries the experts that it leaves out, and may miss one population.
    """
    torch.manual_seed(0)
    given, population = populations(case, rows=60)
    use = case.use(Sizes(width=5, context=5, choices=5)).train()
    right = torch.eye(5)[population]
    learned = [*use.parameters(), *(v for v in given if isinstance(v, torch.nn.Parameter))]
    optimizer = torch.optim.Adam(learned, lr=0.05)
    for step in range(150):
        use.gate.anneal(step / 150)
        optimizer.zero_grad()
        (((use(*given) - right) ** 2).sum(1).mean() + use.gate.penalty()).backward()
        optimizer.step()
    weights = use.eval()(*given)
    assert (weights.argmax(1) == population).float().mean() >= 0.8
    assert ((weights - right) ** 2).sum(1).mean() < 0.4
