from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ctr_models.errors import ConfigError
from ctr_models.gates import Gate, GateShape, GateSpec

QUERY = torch.zeros(1, 1, 3)


def make(**options: object) -> Gate:
    spec = GateSpec.parse({"name": "clipped_softmax", **options})
    return spec.build(GateShape(slot="attention", width=2, context=3, heads=1))


def scores(*shares: float) -> Tensor:
    return torch.tensor(shares).log().view(1, 1, 1, -1)


def test_it_is_the_stretched_softmax_clipped() -> None:
    """(1.5 + 0.25) p - 0.25 with L = 4 and alpha = 1."""
    weights = make(alpha=1.0, zeta=1.5).attend(scores(0.75, 0.15, 0.06, 0.04), QUERY)
    torch.testing.assert_close(weights.flatten(), torch.tensor([1.0, 0.0125, 0.0, 0.0]), rtol=0, atol=1e-6)


def test_the_length_is_that_of_the_keys_not_of_the_padding() -> None:
    gate = make(alpha=1.0)
    padded = gate.attend(torch.cat([scores(0.7, 0.3), torch.full((1, 1, 1, 3), -torch.inf)], dim=3), QUERY)
    torch.testing.assert_close(padded[..., :2], gate.attend(scores(0.7, 0.3), QUERY))
    torch.testing.assert_close(padded.flatten(), torch.tensor([0.55, 0.0, 0.0, 0.0, 0.0]), rtol=0, atol=1e-6)


def test_a_head_can_do_nothing() -> None:
    assert make(alpha=2.0).attend(torch.zeros(1, 1, 1, 8), QUERY).max() == 0


def test_by_default_even_attention_passes_and_learns() -> None:
    even = torch.zeros(1, 1, 1, 8, requires_grad=True)
    weights = make().attend(even, QUERY)
    torch.testing.assert_close(weights.flatten(), torch.full((8,), (1 + 0.0625) / 8 - 0.0625))
    (weights * torch.arange(8.0)).sum().backward()
    assert even.grad is not None and even.grad.abs().min() > 0


def test_from_the_identity_it_grows_with_training() -> None:
    gate = make(start="identity", alpha=1.0, zeta=1.5, grown=0.5)
    p, full = scores(0.6, 0.4), make(alpha=1.0, zeta=1.5)
    torch.testing.assert_close(gate.attend(p, QUERY), p.softmax(-1))
    gate.anneal(0.25)
    torch.testing.assert_close(
        gate.attend(p, QUERY).flatten(), torch.tensor([0.65, 0.35])
    )  # (1.25 + 0.25) p - 0.25
    gate.anneal(0.8)
    torch.testing.assert_close(gate.attend(p, QUERY), full.attend(p, QUERY))
    assert gate.state_dict()["stretch"] == 1


def test_as_in_the_paper_training_changes_nothing() -> None:
    gate = make()
    gate.anneal(0.0)
    assert gate.state_dict()["stretch"] == 1


@pytest.mark.parametrize("wrong", [{"alpha": -1}, {"zeta": 0.5}, {"grown": 0}])
def test_a_wrong_option_is_named(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"^{next(iter(wrong))}: must be"):
        make(**wrong)
