"""The slots of a node's ranks: which memory operations meet. Page faults are counted, not timed."""

from __future__ import annotations

import platform
import resource

import numpy as np
import pytest
from ranks import run_ranks

from hfreduce import Communicator

CALLS = 200
#: More than five calls touch; a rank has so many of 128 KiB.
SLOTS = 64


def faults(comm: Communicator, collective: str, count: int) -> tuple[int, int]:
    """Page faults of the first five calls, and of CALLS later ones together, the least of three times."""
    x, out = np.ones(count * comm.nranks, np.float32), np.ones(count * comm.nranks, np.float32)
    part = out[comm.rank * count : (comm.rank + 1) * count]
    call = {
        "all_reduce": lambda: comm.all_reduce(x[:count]),
        "all_reduce to out": lambda: comm.all_reduce(x, out),
        "all_gather": lambda: comm.all_gather(part, out),
        "reduce_scatter": lambda: comm.reduce_scatter(x, part),
        "broadcast": lambda: comm.broadcast(x),
    }[collective]

    def met(calls: int) -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(calls):
            call()
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    first = met(5)
    met(10)
    return first, min(met(CALLS) for _ in range(3))  # slots of a rank that had to wait long are unmapped


@pytest.mark.skipif(tuple(map(int, platform.release().split(".")[:2])) < (5, 14), reason="Linux before 5.14 maps page by page")
@pytest.mark.parametrize("nranks", [2, 3])
@pytest.mark.parametrize("count", [1024, 8192, 30000], ids=["4K", "32K", "117K"])
@pytest.mark.parametrize("collective", ["all_reduce", "all_reduce to out", "all_gather", "reduce_scatter", "broadcast"])
def test_new_pages_are_met_in_the_first_calls_only(collective: str, count: int, nranks: int) -> None:
    for first, later in run_ranks(faults, nranks, collective, count, env={"HFREDUCE_SLOTS": str(SLOTS)}):
        assert later < CALLS // 8, f"{later} page faults in {CALLS} calls that should be in the swing of things"
        assert first < SLOTS * 32, f"{first} page faults in 5 calls: memory is taken before it is known to be needed"
