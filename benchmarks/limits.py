"""The limit of a collective on one node: bytes that must be read and written once each, over the memory's measured bandwidth."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
from measuring import Entry

import hfreduce

#: Kernels' names begin so; their entries are not libraries.
COPY, ADD = "(copy)", "(add)"
#: Below it a kernel's time is that of its call, not the memory's, and there is no limit to speak of.
SMALLEST = 64 << 10

# Bytes that all ranks together read and write at least, by size S and rank count n: each input once, each output once.
_BYTES: dict[str, Callable[[int], int]] = {
    "all_reduce": lambda n: 2 * n,  # n S read, n S written
    "all_to_all": lambda n: 2 * n,
    "all_gather": lambda n: n + 1,  # n inputs of S / n read, n S written
    "reduce_scatter": lambda n: n + 1,
    "reduce": lambda n: n + 1,  # n S read, S written
    "broadcast": lambda n: n,  # S read, (n - 1) S written: the root's own is there
    "barrier": lambda n: 0,
}


def least_bytes(collective: str, size: int, nranks: int) -> int:
    """Bytes that a node must read and write for one call."""
    return _BYTES[collective](nranks) * size


def kernels(comm: hfreduce.Communicator, size: int) -> list[Entry]:
    """A copy (b = a) and an addition (a = a + b), which all ranks run at once.

    On arrays as large as the message, so that caches help both alike.
    """
    a, b = (np.zeros(size // 4, np.float32) for _ in range(2))
    return [
        Entry(COPY, partial(np.copyto, b, a), comm.barrier, alone=True),
        Entry(ADD, partial(np.add, a, b, a), comm.barrier, alone=True),
    ]


def bandwidth(times: Mapping[str, Any], size: int, nranks: int) -> float:
    """Bytes a microsecond of the whole node, from microseconds of the kernels: that of the one which moves more."""
    moved = size // 4 * 4 * nranks
    return max(2 * moved / float(np.median(times[COPY])), 3 * moved / float(np.median(times[ADD])))


def limit(collective: str, times: Mapping[str, Any], size: int, nranks: int) -> float:
    """Microseconds that a call must take at least."""
    return least_bytes(collective, size, nranks) / bandwidth(times, size, nranks)
