"""The stable hash: as defined, in batches of any shape, spread evenly."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.features import hashing
from pipelines.features.hashing import combine, mix, stable_hash, text_hash

P, M = 0x9E3779B97F4A7C15, 2**64


def finaliser(x: int) -> int:
    x ^= x >> 30
    x = x * 0xBF58476D1CE4E5B9 % M
    x ^= x >> 27
    x = x * 0x94D049BB133111EB % M
    return x ^ (x >> 31)


def by_definition(text: str, salt: int) -> int:
    data = text.encode()
    total = sum((b + 1) * pow(P, i, M) for i, b in enumerate(data)) + len(data)
    return finaliser(finaliser(total % M) ^ finaliser((salt + 1) % M))


@settings(max_examples=200, deadline=None)
@given(texts=st.lists(st.text(max_size=12), max_size=8), salt=st.integers(0, 2**31))
def test_texts_hash_as_defined_wherever_they_stand(texts: list[str], salt: int) -> None:
    hashed = stable_hash(pl.Series(texts, dtype=pl.String), salt)
    assert hashed.tolist() == [by_definition(t, salt) for t in texts]


def test_slices_and_chunks_hash_the_same() -> None:
    series = pl.Series([f"é{i}" * (i % 7) for i in range(500)])
    whole = stable_hash(series)
    chunked = pl.concat([series[:123], series[123:]], rechunk=False)
    np.testing.assert_array_equal(stable_hash(chunked), whole)
    np.testing.assert_array_equal(stable_hash(series[77:200]), whole[77:200])


def test_giant_texts_pass_the_block() -> None:
    giant = "x" * 3_000_000
    hashed = stable_hash(pl.Series(["a", giant, "b", giant]))
    assert hashed[0] == stable_hash(pl.Series(["a"]))[0]
    assert hashed[1] == hashed[3] != hashed[2]


def test_threads_do_not_take_each_others_powers(monkeypatch: pytest.MonkeyPatch) -> None:
    short, long = pl.Series(["a"]), pl.Series(["b" * 2000])
    expected = stable_hash(short)[0], stable_hash(long)[0]
    cumprod = np.cumprod

    def interrupted(steps: np.ndarray) -> np.ndarray:
        """While the long text's powers are made, another thread needs and keeps those of a short one."""
        powers = cumprod(steps)
        if len(steps) > 1000:
            monkeypatch.setattr(np, "cumprod", cumprod)
            monkeypatch.setattr(hashing, "_kept", (np.ones(1, dtype=np.uint64),) * 2)
            assert stable_hash(short)[0] == expected[0]
        return powers

    monkeypatch.setattr(hashing, "_kept", (np.ones(1, dtype=np.uint64),) * 2)
    monkeypatch.setattr(np, "cumprod", interrupted)
    assert stable_hash(long)[0] == expected[1]


def test_integers_and_floats_hash_their_bits() -> None:
    salted = finaliser(1)
    assert stable_hash(pl.Series([-1]))[0] == finaliser((M - 1) ^ salted)
    assert stable_hash(pl.Series([1.5]))[0] == finaliser(0x3FF8000000000000 ^ salted)


@pytest.mark.parametrize(
    "values",
    [pl.Series(range(200_000)), pl.Series([f"user{i}" for i in range(200_000)]), pl.Series(range(200_000)) * 0.5],
)
def test_buckets_fill_evenly(values: pl.Series) -> None:
    counts = np.bincount((stable_hash(values) % np.uint64(100)).astype(np.int64), minlength=100)
    # 2,000 are expected in each; five standard deviations are 223.
    assert counts.min() > 1_777
    assert counts.max() < 2_223
    assert len(np.unique(stable_hash(values))) == 200_000
    other = stable_hash(values, salt=1) % np.uint64(100)
    assert abs(float((other == stable_hash(values) % np.uint64(100)).mean()) - 0.01) < 0.002


def test_the_hash_is_pinned() -> None:
    # Ids of models in service hang on these; a change must be a new format.
    texts = [8841707400507832957, 10748281936600434819, 11578143003660122718]
    assert stable_hash(pl.Series(["", "a", "日本"])).tolist() == texts
    assert stable_hash(pl.Series([0, -7]), salt=5).tolist() == [3497389314530649856, 761076768878652421]
    assert mix(np.array([0, 1], dtype=np.uint64)).tolist() == [0, 0x5692161D100B05E5]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, M - 1), min_size=3, max_size=3), min_size=1, max_size=4))
def test_several_hashes_are_combined_as_defined(parts: list[list[int]]) -> None:
    expected = parts[0]
    for other in parts[1:]:
        expected = [finaliser((one * P + two) % M) for one, two in zip(expected, other, strict=True)]
    assert combine([np.array(p, dtype=np.uint64) for p in parts]).tolist() == expected


def test_pairs_of_small_numbers_do_not_meet() -> None:
    hashes = stable_hash(pl.Series(range(600)))
    left, right = np.repeat(hashes, 600), np.tile(hashes, 600)
    assert len(np.unique(combine([left, right]))) == 360_000


@given(st.text(max_size=40), st.integers(-(2**63), 2**63 - 1))
def test_one_text_hashes_as_in_a_batch(text: str, salt: int) -> None:
    assert text_hash(text, salt) == int(stable_hash(pl.Series([text]), salt)[0])
