from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ctr_models.shared_rows import Columns, SharedRows, columns_of, joined, summed

NAMES, DIMS = ("age", "price", "city", "hour", "item"), (2, 1, 2, 3, 2)
COLUMNS = Columns(NAMES, DIMS, frozenset({"age", "city", "hour"}))


def rows(counts: list[int], columns: Columns = COLUMNS) -> SharedRows:
    torch.manual_seed(0)
    width = sum(d for n, d in zip(columns.names, columns.dims, strict=True) if n in columns.shared)
    own = sum(columns.dims) - width
    offsets = torch.tensor([0, *counts]).cumsum(0)
    return SharedRows(torch.randn(len(counts), width), torch.randn(sum(counts), own), offsets, columns)


def by_hand(x: SharedRows) -> Tensor:
    """Field by field, from the definition."""
    shared, own = x.shared[x.user], x.own
    parts, taken = [], [0, 0]
    for name, dim in zip(x.columns.names, x.columns.dims, strict=True):
        kind = int(name in x.columns.shared)
        parts.append((own, shared)[kind][:, taken[kind] : taken[kind] + dim])
        taken[kind] += dim
    return torch.cat(parts, dim=1)


every = pytest.mark.parametrize(
    "x",
    [
        rows([4]),
        rows([2, 0, 3]),
        rows([0]),
        rows([3, 1], Columns(NAMES, DIMS, frozenset(NAMES))),
        rows([3, 1], Columns(NAMES, DIMS, frozenset())),
    ],
    ids=["one user", "three users", "no candidate", "all shared", "all own"],
)


def test_neighbours_of_a_kind_are_one_run() -> None:
    runs = [
        (run.shared, run.place.start, run.place.stop, run.within.start, run.within.stop) for run in COLUMNS.runs
    ]
    assert runs == [(True, 0, 2, 0, 2), (False, 2, 3, 0, 1), (True, 3, 8, 2, 7), (False, 8, 10, 1, 3)]
    assert columns_of(NAMES, DIMS, COLUMNS.shared) is columns_of(NAMES, DIMS, COLUMNS.shared)


@every
def test_joined_they_are_plain_rows(x: SharedRows) -> None:
    plain = by_hand(x)
    assert torch.equal(x.joined(), plain)
    assert torch.equal(joined(x), plain)
    assert joined(plain) is plain
    for name, part in zip(NAMES, plain.split(DIMS, dim=1), strict=True):
        assert torch.equal(x.field(name), part)


@every
def test_what_is_done_to_them_is_done_to_plain_rows(x: SharedRows) -> None:
    plain, layer = by_hand(x), nn.Linear(10, 4)
    mask = torch.rand(len(x.shared), 10)
    with torch.no_grad():
        for fused in (True, False):
            torch.testing.assert_close(x.linear(layer, fused=fused), layer(plain))
    torch.testing.assert_close(x.masked(mask).joined(), plain * mask[x.user])
    torch.testing.assert_close(x.masked(mask[:1]).joined(), plain * mask[:1])
    torch.testing.assert_close(summed(lambda part: part.square().sum(1), x), plain.square().sum(1))
    picked = torch.cat([x.field("hour"), x.field("price")], dim=1)
    assert torch.equal(x.pick(("hour", "price")).joined(), picked)


@every
def test_a_field_may_become_the_candidates_own(x: SharedRows) -> None:
    city = torch.randn(len(x), 2)
    found = x.replaced({"city": city})
    plain = by_hand(x)
    plain[:, 3:5] = city
    assert torch.equal(found.joined(), plain)
    assert "city" not in found.columns.shared


def test_users_stand_alone_with_zeros_for_candidates() -> None:
    x = rows([2, 0, 3])
    users = x.users()
    assert torch.equal(COLUMNS.cut(users, shared=True), x.shared)
    assert not COLUMNS.cut(users, shared=False).any()
