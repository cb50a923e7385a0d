from __future__ import annotations

import torch

from ctr_models.gates import Gate, GateShape, GateSpec

OFFSETS = torch.tensor([0, 3, 3, 4])
VALUES = torch.tensor([[1.0], [10.0], [100.0], [7.0]])
QUERY = torch.zeros(3, 1)


def make(**options: object) -> Gate:
    return GateSpec.parse({"name": "recency", **options}).build(GateShape(slot="sequence", width=1))


def test_the_prior_halves_with_the_half_life_and_sums_to_one() -> None:
    prior = make(half_life=1.0).prior(OFFSETS, 4, torch.float32)  # type: ignore[operator]
    torch.testing.assert_close(prior, torch.tensor([1 / 7, 2 / 7, 4 / 7, 1.0]))


def test_it_mixes_the_scores_with_the_prior() -> None:
    gate, scores = make(half_life=1.0), torch.tensor([3.0, 0.0, 1.0, 2.0])
    g = torch.sigmoid(torch.tensor(1.0))
    prior = torch.tensor([(1 + 20 + 400) / 7, 0.0, 7.0])
    content = torch.tensor([103.0, 0.0, 14.0])
    expected = (1 - g) * content + g * prior
    torch.testing.assert_close(gate.pool(VALUES, scores, OFFSETS, QUERY).squeeze(1), expected)


def test_from_the_identity_it_starts_with_the_scores() -> None:
    scores = torch.tensor([3.0, 0.0, 1.0, 2.0])
    pooled = make(start="identity").pool(VALUES, scores, OFFSETS, QUERY)
    assert pooled.squeeze(1).tolist() == [103.0, 0.0, 14.0]


def test_a_history_of_thousands_stays_finite_in_bfloat16() -> None:
    gate, offsets = make(half_life=1000.0).bfloat16(), torch.tensor([0, 5000])
    values, scores = torch.ones(5000, 1, dtype=torch.bfloat16), torch.zeros(5000)
    pooled = gate.pool(values, scores, offsets, torch.zeros(1, 1, dtype=torch.bfloat16))
    torch.testing.assert_close(pooled.float(), torch.sigmoid(torch.ones(1, 1)), rtol=0.02, atol=0)
    prior = gate.prior(offsets, 5000, torch.float32)  # type: ignore[operator]
    assert prior.diff().min() > 0, "ages of neighbours are told apart"
