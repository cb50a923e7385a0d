from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ctr_models.errors import ConfigError
from ctr_models.layers.sequence_encoder import (
    AttentionBlock,
    MQSAEncoderConfig,
    SASRecEncoderConfig,
    SequenceEncoder,
    moving_mean,
)

CONFIGS = [SASRecEncoderConfig(heads=2), MQSAEncoderConfig(heads=2, blocks=2)]
every_config = pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.name)
LENGTHS = [3, 0, 1, 7, 5]


def make(config: SASRecEncoderConfig | MQSAEncoderConfig, length: int = 9) -> SequenceEncoder:
    torch.manual_seed(0)
    return SequenceEncoder(4, config, max_length=length, std=0.5).eval()


def histories() -> tuple[Tensor, Tensor]:
    offsets = torch.tensor([0, *LENGTHS]).cumsum(0)
    return torch.randn(int(offsets[-1]), 4, generator=torch.manual_seed(1)), offsets


def one_by_one(encoder: SequenceEncoder, x: Tensor) -> Tensor:
    """Encode one history, (n, d), as the equations stand, position by position and head by head."""
    x = x[-encoder.length :]
    h = 4**0.5 * x + encoder.positions[: len(x)].flip(0)
    mixed = torch.zeros_like(x)
    for weight, stack in zip(encoder.weights, encoder.stacks, strict=True):
        z = h
        *blocks, norm = stack
        for block in blocks:
            rows = []
            for t in range(len(z)):
                past = z[: t + 1]
                q = block.query_norm(past[-block.length :].mean(0))
                heads = []
                for part in torch.arange(4).chunk(block.heads):
                    scores = block.key(past)[:, part] @ block.query(q)[part] / len(part) ** 0.5
                    heads.append(scores.softmax(0) @ block.value(past)[:, part])
                a = block.norm(q + torch.cat(heads))
                rows.append(a + block.feed[3](F.relu(block.feed[0](a))))
            z = torch.stack(rows)
        mixed = mixed + weight * norm(z)
    return mixed


@every_config
def test_it_is_what_the_equations_say(config: SASRecEncoderConfig | MQSAEncoderConfig) -> None:
    encoder, (values, offsets) = make(config), histories()
    expected = torch.cat([one_by_one(encoder, x) for x in values.split(LENGTHS) if len(x)])
    torch.testing.assert_close(encoder(values, offsets), expected, rtol=1e-4, atol=1e-5)


@every_config
def test_a_history_does_not_depend_on_those_beside_it(config: SASRecEncoderConfig | MQSAEncoderConfig) -> None:
    encoder, (values, offsets) = make(config), histories()
    together = encoder(values, offsets).split(LENGTHS)
    for x, own in zip(values.split(LENGTHS), together, strict=True):
        torch.testing.assert_close(encoder(x, torch.tensor([0, len(x)])), own, rtol=1e-5, atol=1e-6)
    far = values.clone()
    far[4:11] = 1e4  # the history of 7
    for place in (0, 2, 4):
        assert torch.equal(encoder(far, offsets).split(LENGTHS)[place], together[place])


@every_config
def test_no_behaviour_sees_a_later_one(config: SASRecEncoderConfig | MQSAEncoderConfig) -> None:
    encoder, (values, offsets) = make(config), histories()
    values.requires_grad_()
    encoder(values, offsets)[6, 0].backward()  # the third of the history of 7, which begins at 4
    assert values.grad is not None
    assert (values.grad.abs().sum(1) > 0).nonzero().flatten().tolist() == [4, 5, 6]


@every_config
def test_the_last_is_the_last_of_all(config: SASRecEncoderConfig | MQSAEncoderConfig) -> None:
    encoder, (values, offsets) = make(config), histories()
    last, encoded = encoder.last(values, offsets.int()), encoder(values, offsets)
    for row, own in enumerate(encoded.split(LENGTHS)):
        assert torch.equal(last[row], own[-1] if len(own) else torch.zeros(4))


@every_config
def test_what_is_too_old_is_not_looked_at(config: SASRecEncoderConfig | MQSAEncoderConfig) -> None:
    encoder, (values, offsets) = make(config, length=4), histories()
    encoded = encoder(values, offsets).split(LENGTHS)
    assert (encoded[3][:3] == 0).all()
    torch.testing.assert_close(encoded[3][3:], one_by_one(encoder, values[4:11]), rtol=1e-4, atol=1e-5)
    assert make(config.model_copy(update={"length": 2}), length=4).positions.shape == (2, 4)


def test_a_batch_of_empty_histories_is_zeros() -> None:
    encoder, nothing = make(CONFIGS[0]), torch.zeros(0, 4)
    assert encoder(nothing, torch.zeros(3, dtype=torch.long)).shape == (0, 4)
    assert torch.equal(encoder.last(nothing, torch.zeros(3, dtype=torch.long)), torch.zeros(2, 4))


def test_long_queries_of_one_are_short_queries() -> None:
    torch.manual_seed(0)
    block, x = AttentionBlock(4, 1, 0.0, 3), torch.randn(2, 5, 4)
    long = block(x)
    block.length = 1
    assert torch.equal(long[:, 0], block(x)[:, 0])
    assert (long[:, 1:] != block(x)[:, 1:]).any(2).all()


def test_the_mean_is_over_what_is_there() -> None:
    x = torch.arange(5.0).view(1, 5, 1)
    assert moving_mean(x, 3).flatten().tolist() == [0, 0.5, 1, 2, 3]
    assert moving_mean(x, 9).flatten().tolist() == [0, 0.5, 1, 1.5, 2]


def test_heads_that_do_not_fit_are_named() -> None:
    with pytest.raises(ConfigError, match=r"model.encoder.heads: 3 heads don't divide a dimension of 4. one of"):
        SequenceEncoder(4, SASRecEncoderConfig(heads=3), max_length=5)
