"""Exactly predictable values, per rank, and what a reduction of them must give, computed independently with numpy.

Values repeat with a prime period, so that checking costs little memory and no chunk size of the library is a multiple of
it. They are chosen so that every partial result is exact in the datatype, in whatever order ranks are added: the check
needs no tolerance.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

#: Elements after which the values repeat.
PERIOD = 8191

# Largest integer up to which all are exact (or which does not wrap), and largest exponent of two that a product may reach.
_EXACT = {"int8": 127, "uint8": 255, "float16": 2048, "bfloat16": 256, "float8_e4m3fn": 16, "float8_e5m2": 8}
_EXPONENT = {"int8": 6, "uint8": 7, "float8_e4m3fn": 8}


def _hash(key: int) -> Array:
    """PERIOD integers from 0 to 15 that look random and depend on key."""
    values = np.arange(PERIOD, dtype=np.uint64) * np.uint64(2654435761) + np.uint64((key * 0x9E3779B97F4A7C15) % 2**64)
    values ^= values >> np.uint64(29)
    values *= np.uint64(0xBF58476D1CE4E5B9)
    result: Array = ((values >> np.uint64(40)) & np.uint64(15)).astype(np.int64)
    return result


@cache
def moved(key: int, dtype: np.dtype[Any]) -> Array:
    """PERIOD values for data that is only moved; key tells apart whose data it is."""
    limit = _EXACT.get(dtype.name, 127)
    return np.minimum(_hash(key), limit).astype(dtype)


def _integers(rank: int, nranks: int, op: str, dtype: np.dtype[Any]) -> Array:
    index = np.arange(PERIOD)
    if op in ("sum", "avg"):
        limit = min(_EXACT.get(dtype.name, 1 << 15), 1 << 15)
        if limit >= nranks:
            spread: Array = _hash(rank) % (min(limit // nranks, 15) + 1)
            return spread
        stride = -(-nranks // limit)  # so many ranks that only every stride-th may contribute
        sparse: Array = ((index + rank) % stride == 0).astype(np.int64)
        return sparse
    if op == "prod":
        stride = -(-nranks // _EXPONENT.get(dtype.name, 12))
        return np.where(((index + rank) % stride == 0) & (_hash(rank) & 1 == 1), 2, 1)
    if op in ("max", "min"):
        limit = min(_EXACT.get(dtype.name, 15), 15)
        values = np.minimum(_hash(rank), limit)
        return values if dtype.kind == "u" else np.where(_hash(rank + 7919) & 1 == 1, values, -values)
    raise ValueError(f"no pattern for op {op!r}")


@cache
def reduced_input(rank: int, nranks: int, op: str, dtype: np.dtype[Any]) -> Array:
    """PERIOD values that `rank` gives to a reduction."""
    return _integers(rank, nranks, op, dtype).astype(dtype)


@cache
def reduced(nranks: int, op: str, dtype: np.dtype[Any]) -> Array:
    """PERIOD values that must come out of the reduction of all ranks' `reduced_input`."""
    total = _integers(0, nranks, op, dtype)
    for rank in range(1, nranks):
        values = _integers(rank, nranks, op, dtype)
        if op in ("sum", "avg"):
            total = total + values
        elif op == "prod":
            total = total * values
        else:
            total = np.maximum(total, values) if op == "max" else np.minimum(total, values)
    if op != "avg":
        return total.astype(dtype)
    if dtype.kind in "iu":
        return (total // nranks).astype(dtype)  # never negative, so this truncates
    kind = np.dtype(np.float64 if dtype == np.float64 else np.float32)
    mean: Array = total.astype(kind) / np.array(nranks, kind)
    return mean.astype(dtype)


def fill(array: Array, pattern: Array) -> None:
    """Repeat pattern over a one-dimensional array."""
    whole = array.size // PERIOD * PERIOD
    array[:whole].reshape(-1, PERIOD)[...] = pattern
    array[whole:] = pattern[: array.size - whole]


def wrong(array: Array, pattern: Array) -> int:
    """Number of elements of a one-dimensional array that are not the repeated pattern, bit by bit (-0 counts as 0)."""
    whole = array.size // PERIOD * PERIOD
    bits = np.dtype(f"u{array.dtype.itemsize}")
    bad = 0
    for part, expected in ((array[:whole].reshape(-1, PERIOD), pattern), (array[whole:], pattern[: array.size - whole])):
        differ = part.view(bits) != expected.view(bits)
        if differ.any():  # signs of zero, if nothing else
            differ &= ~((part == np.zeros((), part.dtype)) & (expected == np.zeros((), part.dtype)))
        bad += int(np.count_nonzero(differ))
    return bad
