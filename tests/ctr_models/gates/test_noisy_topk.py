from __future__ import annotations

import torch
from torch.nn import functional as F

from ctr_models.gates import GateShape, GateSpec
from ctr_models.gates.noisy_topk import NoisyTopKGate, chance_to_be_kept
from ctr_models.gates.topk import keep_largest


def gate(choices: int = 4, **options: object) -> NoisyTopKGate:
    torch.manual_seed(0)
    shape = GateShape(slot="expert", width=3, choices=choices)
    built = GateSpec.parse({"name": "noisy_topk", **options}).build(shape)
    assert isinstance(built, NoisyTopKGate)
    return built


def test_noise_has_the_learned_size() -> None:
    g, x = gate(), torch.randn(6, 3)
    torch.nn.init.normal_(g.noise.weight)
    torch.manual_seed(1)
    found = g(x)
    torch.manual_seed(1)
    size = F.softplus(x @ g.noise.weight.T) + 0.01
    torch.testing.assert_close(found, keep_largest(g.logits(x) + torch.randn(6, 4) * size, 2))


def test_in_evaluation_it_is_topk() -> None:
    g, x = gate().eval(), torch.randn(6, 3)
    assert torch.equal(g(x), keep_largest(g.logits(x), 2))


def test_chance_by_hand() -> None:
    """Kept at 1.5, the first has to stay above 0.2; left out at 0.2, the second has to rise above 1.5."""
    found = chance_to_be_kept(
        torch.tensor([[1.0, 0.0]]), torch.tensor([[1.5, 0.2]]), torch.tensor([[2.0, 0.5]]), k=1
    )
    torch.testing.assert_close(found, torch.tensor([[0.65542, 0.00135]]), rtol=0, atol=1e-5)


def test_chance_is_how_often_it_happens() -> None:
    torch.manual_seed(0)
    clean, noisy, size = torch.randn(1, 5), torch.randn(1, 5), torch.rand(1, 5) + 0.5
    found = chance_to_be_kept(clean, noisy, size, k=2)[0]
    for i in range(5):
        drawn = noisy.expand(20000, 5).clone()
        drawn[:, i] = clean[0, i] + torch.randn(20000) * size[0, i]
        often = (keep_largest(drawn, 2)[:, i] > 0).float().mean()
        torch.testing.assert_close(found[i], often, rtol=0, atol=0.012)


def test_the_penalty_evens_out_the_use() -> None:
    g, x = gate(balance=1.0), torch.randn(256, 3)
    with torch.no_grad():
        g.linear.bias.copy_(torch.tensor([3.0, 0.0, 0.0, 0.0]))  # type: ignore[union-attr]
    before = g.telemetry(g.eval()(x))["importance"]
    optimizer = torch.optim.Adam(g.train().parameters(), lr=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        g(x)
        g.penalty().backward()
        optimizer.step()
    assert g.telemetry(g.eval()(x))["importance"] < 0.2 * before


def test_the_penalty_is_of_the_last_batch_and_asked_for_once() -> None:
    g = gate()
    assert float(g.penalty()) == 0
    g(torch.randn(6, 3))
    assert g.penalty().item() > 0
    assert float(g.penalty()) == 0
    g.eval()(torch.randn(6, 3))
    assert float(g.penalty()) == 0


def test_the_penalty_is_of_importance_and_load() -> None:
    g, x = gate(balance=0.5), torch.randn(6, 3)
    torch.manual_seed(1)
    weights, price = g(x), g.penalty()
    torch.manual_seed(1)
    size = F.softplus(g.noise(x)) + 0.01
    clean = g.logits(x)
    chance = chance_to_be_kept(clean, clean + torch.randn(6, 4) * size, size, k=2)
    cv2 = [(u.std(correction=0) / u.mean()) ** 2 for u in (weights.sum(0), chance.sum(0))]
    torch.testing.assert_close(price, 0.5 * (cv2[0] + cv2[1]))


def test_with_all_kept_only_importance_counts() -> None:
    g = gate(choices=2)
    weights = g(torch.randn(6, 3))
    uses = weights.sum(0)
    torch.testing.assert_close(g.penalty(), 0.1 * uses.var(correction=0) / uses.mean() ** 2)
