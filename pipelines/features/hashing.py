"""A stable hash of values, the same in a batch of millions and in one request, today and next year.

Integers go through the finaliser of splitmix64. Text is a polynomial over its UTF-8 bytes modulo 2^64,
:math:`\\sum_i (b_i + 1) P^i` with odd :math:`P`, mixed with its length by the same finaliser. Because P has an
inverse modulo 2^64, the sums of all texts of a column come from one cumulative sum over its bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl
import pyarrow as pa

_P = 0x9E3779B97F4A7C15 | 1
_P_INVERSE = pow(_P, -1, 2**64)
_MASK = 2**64 - 1
_BLOCK = 1 << 20
"""Bytes that are summed at a time, so that the powers of P stay in cache-sized arrays."""


def mix(x: np.ndarray) -> np.ndarray:
    """Return splitmix64's finaliser of unsigned 64-bit integers (Steele et al., 2014).

    Args:
        x: (N,) uint64.

    Example:
        >>> hex(int(mix(np.array([1], dtype=np.uint64))[0]))
        '0x5692161d100b05e5'
    """
    x = x ^ (x >> np.uint64(30))
    x = x * np.uint64(0xBF58476D1CE4E5B9)
    x = x ^ (x >> np.uint64(27))
    x = x * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def stable_hash(values: pl.Series, salt: int = 0) -> np.ndarray:
    """Return the hash of canonical values (Int64, Float64 or String).

    Args:
        values: N values without nulls.
        salt: another salt gives another, independent hash.

    Returns:
        (N,) uint64.

    Example:
        >>> stable_hash(pl.Series(["a", "b"])) % 10
        array([9, 5], dtype=uint64)
    """
    if values.dtype == pl.String:
        hashed = _text_hash(values.rechunk().to_arrow())
    else:
        hashed = values.to_numpy().view(np.uint64)
    return mix(hashed ^ mix(np.array([salt], dtype=np.int64).view(np.uint64) + np.uint64(1)))


def text_hash(text: str, salt: int = 0) -> int:
    """Return what :func:`stable_hash` returns of one text: faster for a single one, with nothing to set up.

    Example:
        >>> text_hash("a") % 10, text_hash("b") % 10
        (9, 5)
    """
    total, power = 0, 1
    data = text.encode()
    for byte in data:
        total += (byte + 1) * power
        power = power * _P & _MASK
    return _mix_one(_mix_one(total + len(data) & _MASK) ^ _mix_one(salt + 1 & _MASK))


def _mix_one(x: int) -> int:
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _MASK
    return x ^ x >> 31


def combine(hashes: Sequence[np.ndarray]) -> np.ndarray:
    """Return one hash of several, row by row; their order matters.

    Args:
        hashes: (N,) uint64 each.

    Example:
        >>> a, b = np.array([1, 2], dtype=np.uint64), np.array([2, 1], dtype=np.uint64)
        >>> len(set(combine([a, b]).tolist()) | set(combine([b]).tolist()))
        4
    """
    out = hashes[0]
    for other in hashes[1:]:
        # P is odd, so each hash alone decides the result one to one.
        out = mix(out * np.uint64(_P) + other)
    return out


def _text_hash(array: pa.Array) -> np.ndarray:
    array = array.cast(pa.large_string())
    offsets = np.frombuffer(array.buffers()[1], dtype=np.int64)[array.offset : array.offset + len(array) + 1]
    data = array.buffers()[2]
    content = np.frombuffer(data, dtype=np.uint8) if data is not None else np.empty(0, dtype=np.uint8)
    out = np.empty(len(array), dtype=np.uint64)
    start = 0
    while start < len(array):
        # As many texts as fit a block; at least one, however long.
        stop = max(int(np.searchsorted(offsets, offsets[start] + _BLOCK, side="right")) - 1, start + 1)
        base, end = int(offsets[start]), int(offsets[stop])
        powers, inverses = _powers(end - base)
        sums = np.zeros(end - base + 1, dtype=np.uint64)
        np.cumsum((content[base:end].astype(np.uint64) + np.uint64(1)) * powers[: end - base], out=sums[1:])
        left, right = offsets[start:stop] - base, offsets[start + 1 : stop + 1] - base
        out[start:stop] = (sums[right] - sums[left]) * inverses[left]
        out[start:stop] += (right - left).astype(np.uint64)
        start = stop
    return mix(out)


_kept = (np.ones(1, dtype=np.uint64), np.ones(1, dtype=np.uint64))


def _powers(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return P^0..P^size and their inverses modulo 2^64."""
    global _kept
    powers = _kept  # read once: another thread may put a smaller pair there
    if len(powers[0]) <= size:
        length = 1 << (size + 1).bit_length()
        steps = np.array([[_P], [_P_INVERSE]], dtype=np.uint64).repeat(length, axis=1)
        steps[:, 0] = 1
        powers = np.cumprod(steps[0]), np.cumprod(steps[1])
        if length <= 4 * _BLOCK:  # more is for one giant text: not worth keeping
            _kept = powers
    return powers
