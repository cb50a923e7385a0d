from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ctr_models.gates import Gate, GateShape, GateSpec

FIELDS, WIDTH = 3, 4


def make(**options: int) -> Gate:
    torch.manual_seed(0)
    return GateSpec.parse({"name": "mixer", **options}).build(GateShape(slot="field", width=WIDTH, fields=FIELDS))


def test_it_mixes_across_fields_then_across_coordinates() -> None:
    gate, x = make(), torch.randn(1, FIELDS, WIDTH)
    fields, values = gate.across_fields, gate.across_values

    def normed(rows: Tensor) -> Tensor:
        centred = rows - rows.mean(1, keepdim=True)
        return centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()

    rows = x[0]  # (F, D)
    columns = normed(rows).T  # (D, F), each coordinate over the fields
    h = rows + (F.gelu(columns @ fields[0].weight.T) @ fields[2].weight.T).T
    mixed = h + F.gelu(normed(h) @ values[0].weight.T) @ values[2].weight.T
    torch.testing.assert_close(gate(x)[0], mixed @ gate.linear.weight.T + 1)


def test_a_field_hears_of_the_others() -> None:
    gate, x = make(), torch.randn(1, FIELDS, WIDTH)
    other = x.clone()
    other[0, 2] += torch.randn(WIDTH)
    assert not torch.allclose(gate(x)[0, 0], gate(other)[0, 0])


def test_widths_of_its_perceptrons_can_be_set() -> None:
    gate = make(hidden_fields=7, hidden_values=9)
    assert gate.across_fields[0].weight.shape == (7, FIELDS)
    assert gate.across_values[0].weight.shape == (9, WIDTH)


def test_fresh_embeddings_are_not_lost() -> None:
    x = 1e-4 * torch.randn(50, FIELDS, WIDTH)
    assert make().gated(x).norm() > 0.5 * x.norm()
