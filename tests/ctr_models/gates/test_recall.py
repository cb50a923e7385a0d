from __future__ import annotations

import torch
from torch import Tensor

from ctr_models.gates import Gate, GateConfig, GateShape, GateSpec
from ctr_models.gates.recall import KEYS, PAIRS, VALUES, pairs, recall_of

SHAPE = GateShape(slot="sequence", width=32)


class Softmax(Gate):
    """Attention of the query to the behaviours, which has recall by construction."""

    def pool(self, values: Tensor, scores: Tensor, offsets: Tensor, query: Tensor) -> Tensor:
        rows = torch.repeat_interleave(offsets.diff(), output_size=len(values))
        powers = (values * query[rows]).sum(1).exp()
        sums = powers.new_zeros(len(query)).index_add(0, rows, powers)
        return super().pool(values, powers / sums[rows], offsets, query)


def test_a_history_holds_each_key_once() -> None:
    keys, values = pairs(50)
    assert keys.shape == values.shape == (50, PAIRS)
    assert all(len(set(row)) == PAIRS for row in keys.tolist())
    assert keys.max() < KEYS and values.max() < VALUES


def test_attention_has_recall() -> None:
    torch.manual_seed(0)
    assert recall_of(Softmax(GateConfig(), SHAPE), steps=150) > 0.95


def test_recall_is_not_had_for_nothing() -> None:
    """Without a look at the query, nothing beats the most frequent value of a history by far."""
    torch.manual_seed(0)
    assert recall_of(GateSpec(name="none").build(SHAPE), steps=150) < 0.6
