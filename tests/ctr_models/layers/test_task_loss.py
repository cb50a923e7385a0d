from __future__ import annotations

import math

import pytest
import torch

from ctr_models.layers.task_loss import TaskLoss

NAN = float("nan")


def test_by_hand() -> None:
    logits = torch.tensor([[0.0, 1.0], [2.0, -1.0], [-1.0, 0.5]])
    targets = torch.tensor([[1.0, NAN], [0.0, 0.0], [NAN, 1.0]])

    def softplus(x: float) -> float:
        return math.log1p(math.exp(x))

    first = (softplus(-0.0) + softplus(2.0)) / 2  # the third row is unknown
    second = (softplus(-1.0) + softplus(-0.5)) / 2  # the first row is
    found = TaskLoss([0.5, 2.0])(logits, targets)
    assert found.item() == pytest.approx(0.5 * first + 2.0 * second, rel=1e-6)


def test_an_unknown_label_has_no_gradient_whatever_stands_there() -> None:
    targets = torch.tensor([[1.0], [NAN]])
    grads = []
    for other in (0.0, 50.0):
        logits = torch.tensor([[0.3], [other]], requires_grad=True)
        TaskLoss([1.0])(logits, targets).backward()
        assert logits.grad is not None
        grads.append(logits.grad)
    assert torch.equal(grads[0], grads[1])
    assert grads[0][1] == 0
    assert grads[0][0] == pytest.approx(-1 / (1 + math.exp(0.3)), rel=1e-6)


def test_a_task_of_which_nothing_is_known_adds_nothing() -> None:
    logits = torch.randn(3, 2, requires_grad=True)
    targets = torch.tensor([[NAN, 1.0], [NAN, 0.0], [NAN, 1.0]])
    loss = TaskLoss([1.0, 1.0])(logits, targets)
    loss.backward()
    torch.testing.assert_close(loss, TaskLoss([1.0])(logits[:, 1:], targets[:, 1:]))
    assert logits.grad is not None
    assert torch.equal(logits.grad[:, 0], torch.zeros(3))


def test_weights_are_settings_and_not_saved_with_the_model() -> None:
    assert TaskLoss([0.5]).state_dict() == {}
