from __future__ import annotations

import math

import pytest
import torch

from ctr_models.errors import ConfigError
from ctr_models.gates import GateShape, GateSpec
from ctr_models.gates.gumbel import GumbelGate


def gate(slot: str = "interaction", choices: int = 2, **options: object) -> GumbelGate:
    torch.manual_seed(0)
    shape = GateShape(slot=slot, width=choices, choices=choices, fields=3)  # type: ignore[arg-type]
    built = GateSpec.parse({"name": "gumbel", **options}).build(shape)
    assert isinstance(built, GumbelGate)
    return built


def test_in_evaluation_there_is_no_noise() -> None:
    logits = torch.tensor([[0.0, math.log(3)]])
    torch.testing.assert_close(gate().eval()(logits), torch.tensor([[0.25, 0.75]]))
    torch.testing.assert_close(gate(temperature=0.5).eval()(logits), torch.tensor([[0.1, 0.9]]))


def test_choices_are_drawn_as_often_as_the_logits_say() -> None:
    """Three of them: between two, noise of the wrong sign would not show."""
    shares = torch.tensor([0.1, 0.2, 0.7])
    taken = gate(choices=3).train()(shares.log().expand(40000, 3)).argmax(1)
    torch.testing.assert_close(torch.bincount(taken) / 40000, shares, rtol=0, atol=0.01)


def test_the_temperature_falls_in_a_line() -> None:
    g = gate(temperature=2, final_temperature=0.5)
    for done, expected in ((0.0, 2.0), (0.5, 1.25), (1.0, 0.5)):
        g.anneal(done)
        assert float(g.temperature) == pytest.approx(expected)


def test_the_lower_the_temperature_the_harder_the_choice() -> None:
    g, logits = gate(choices=4).train(), torch.randn(500, 4)
    soft = g(logits).max(1).values.mean()
    g.anneal(1.0)
    assert soft < 0.7
    assert g(logits).max(1).values.mean() > 0.9


@pytest.mark.parametrize("training", [True, False])
def test_a_hard_choice_takes_all_and_still_learns(training: bool) -> None:
    g, x = gate("expert", choices=4, hard=True).train(training), torch.randn(3000, 4)
    weights = g(x)
    assert torch.equal(weights, torch.eye(4)[weights.argmax(1)]), "exactly, lest a little of every expert pass"
    (weights * torch.randn(3000, 4)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in g.parameters())


@pytest.mark.parametrize("slot", ["selection", "field"])
def test_a_mask_is_drawn_in_training_and_plain_after(slot: str) -> None:
    g, x = gate(slot, temperature=0.5), torch.randn(20000, 3, 2)
    logit = math.log(3) / 2
    logits = torch.full((20000, 3), logit)
    if g.logits is not None:
        torch.nn.init.constant_(g.logits, logit)
    given = (x,) if slot == "field" else (x, logits)
    plain = g.eval()(*given)
    torch.testing.assert_close(plain.expand(20000, 3, 1), torch.full((20000, 3, 1), 0.75))
    drawn = g.train()(*given)
    assert drawn.shape == (20000, 3, 1)
    kept = 1 / (1 + 3**-0.5)  # sigmoid of the logit itself, whatever the temperature
    assert (drawn > 0.5).float().mean().item() == pytest.approx(kept, abs=0.01)


def test_started_as_the_identity_logits_at_zero_keep_everything_as_it_is() -> None:
    g = gate("selection", start="identity").eval()
    assert g.initial_logit == 0
    assert torch.equal(g(torch.randn(4, 3, 2), torch.zeros(4, 3)), torch.ones(4, 3, 1))


def test_what_is_no_identity_is_refused() -> None:
    with pytest.raises(ConfigError, match="a hard choice is all or nothing"):
        gate(hard=True, start="identity")
    with pytest.raises(ConfigError, match="model.gates.interaction: start: with an activation or a temperature"):
        gate(temperature=0.5, start="identity")
    gate("expert", temperature=0.5, start="identity")


def test_hardened_it_depends_on_the_sign_alone() -> None:
    g, logits = gate("selection", penalty=0.5).train(), torch.tensor([[0.1, -0.1, 3.0]])
    torch.testing.assert_close(g.value_penalty(logits), 0.5 * torch.sigmoid(logits).sum())
    g.harden()
    assert g(torch.randn(1, 3, 2), logits).flatten().tolist() == [1.0, 0.0, 1.0]
    assert g.kept(logits).tolist() == [[True, False, True]]
    assert float(g.value_penalty(logits)) == 0


def test_fields_pay_for_being_kept() -> None:
    assert gate("field", penalty=2.0).penalty().item() == pytest.approx(2 * 3 * 0.5)
    assert float(gate("selection", penalty=2.0).penalty()) == 0
