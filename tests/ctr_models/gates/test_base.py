from __future__ import annotations

import pytest
import torch

from ctr_models.errors import ConfigError
from ctr_models.gates import GateShape, GateSpec


def test_a_gate_is_read_from_a_name_or_a_mapping() -> None:
    assert GateSpec.parse("none").name == "none"
    assert GateSpec.parse({"name": "sigmoid2", "hidden": [8]}).options == {"hidden": [8]}
    spec = GateSpec(name="sigmoid2")
    assert GateSpec.parse(spec) is spec


def test_the_hash_counts_defaults_and_not_the_order_of_options() -> None:
    first = GateSpec.parse({"name": "sigmoid2", "hidden": [8], "context": "self"})
    second = GateSpec.parse({"context": "self", "name": "sigmoid2", "hidden": [8], "start": "paper"})
    assert first.hash == second.hash
    assert len(first.hash) == 12
    assert first.hash != GateSpec.parse({"name": "sigmoid2", "hidden": [9], "context": "self"}).hash


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("sigmoid3", "unknown gate 'sigmoid3'. did you mean 'sigmoid"),
        ({"hidden": [3]}, "a gate needs a name"),
        ({"name": "sigmoid2", "hiden": [3]}, "^hiden: unknown key. did you mean 'hidden'"),
        ({"name": "sigmoid2", "start": "zero"}, "^start: unknown value 'zero'. known: 'identity', 'paper'"),
        ({"name": "sigmoid2", "context": []}, "^context: must hold at least 1"),
        ({"name": "sigmoid2", "hidden": [0]}, "^hidden.0: must be greater than 0"),
        ({"name": "squeeze_excite", "reduction": 0}, "^reduction: must be at least 1"),
    ],
)
def test_a_wrong_gate_is_explained(given: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GateSpec.parse(given)  # type: ignore[arg-type]


def test_a_slot_that_does_not_fit_names_those_that_do() -> None:
    with pytest.raises(ConfigError, match=r"it fits \['feature', 'field'\]; this slot takes .*'sigmoid'"):
        GateSpec(name="sigmoid2").build(GateShape(slot="cross", width=4))


def test_a_query_without_keys_gets_zeros_and_passes_no_nan_back() -> None:
    gate = GateSpec(name="none").build(GateShape(slot="attention", width=4, context=3, heads=1))
    scores = torch.tensor([[0.0, 0.0, -torch.inf], [-torch.inf] * 3]).view(1, 1, 2, 3).requires_grad_()
    weights = gate.attend(scores, torch.zeros(1, 2, 3))
    assert weights.flatten(0, 2).tolist() == [[0.5, 0.5, 0.0], [0.0, 0.0, 0.0]]
    (weights * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert scores.grad is not None
    torch.testing.assert_close(scores.grad.flatten(0, 2), torch.tensor([[-0.25, 0.25, 0.0], [0.0, 0.0, 0.0]]))


def test_a_history_is_pooled_by_its_scores() -> None:
    gate = GateSpec(name="none").build(GateShape(slot="sequence", width=2))
    values = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    pooled = gate.pool(values, torch.tensor([2.0, 3.0, 5.0]), torch.tensor([0, 0, 2, 3]), torch.zeros(3, 2))
    assert pooled.tolist() == [[0.0, 0.0], [2.0, 3.0], [5.0, 5.0]]


def test_the_ends_of_a_mask_are_those_of_its_range() -> None:
    shape = GateShape(slot="fusion", width=2)
    between_1_and_2 = GateSpec(name="cross_stream").build(shape)
    told = between_1_and_2.telemetry(torch.tensor([[1.0, 2.0]]))
    assert told["saturation"] == 1.0
    assert told["entropy"] == pytest.approx(0.0, abs=1e-4)
    assert between_1_and_2.telemetry(torch.tensor([[1.5]]))["entropy"] == pytest.approx(1.0)
    endless = GateSpec(name="simple").build(GateShape(slot="feature", width=2))
    assert endless.telemetry(torch.tensor([[1.0]]))["entropy"] == pytest.approx(1.0)
    assert endless.telemetry(torch.tensor([[-3.0, 7.0]]))["saturation"] == 1.0


def test_the_telemetry_of_weights_by_hand() -> None:
    gate = GateSpec(name="none").build(GateShape(slot="expert", width=4, choices=2))
    told = gate.telemetry(torch.tensor([[1.0, 0.0], [0.5, 0.5]]))
    assert told == pytest.approx(
        {
            "mean": 0.5,
            "std": 0.125**0.5,
            "saturation": 0.5,
            "entropy": 0.5,
            "zeros": 0.25,
            "importance": 0.25,
            "choice_0": 0.75,
            "choice_1": 0.25,
        }
    )


def test_weights_of_either_sign_are_used_by_their_size() -> None:
    gate = GateSpec(name="none").build(GateShape(slot="expert", width=4, choices=2))
    told = gate.telemetry(torch.tensor([[1.0, -1.0], [-2.0, 2.0]]))
    assert (told["importance"], told["entropy"], told["choice_0"]) == (0.0, 1.0, -0.5)
