"""The test harness itself: what it says of ranks that fail, hang or die, and that nothing of theirs is left."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import numpy as np
import pytest
from ranks import run_ranks

import hfreduce


def rank_and_sum(comm: Any, base: int) -> tuple[int, float]:
    return comm.rank, float(comm.all_reduce(np.full(1, base + comm.rank, np.float64))[0])


@pytest.mark.parametrize("threads", [False, True], ids=["processes", "threads"])
@pytest.mark.parametrize("nranks", [1, 2, 5])
def test_values_by_rank(nranks: int, threads: bool) -> None:
    total = 10.0 * nranks + sum(range(nranks))
    assert run_ranks(rank_and_sum, nranks, 10, threads=threads) == [(rank, total) for rank in range(nranks)]


def nodes(comm: Any) -> tuple[int, int]:
    return comm.node, comm.nodes


def test_environment_of_a_rank() -> None:
    assert run_ranks(nodes, 3, env=lambda rank: {"HFREDUCE_HOSTID": f"host{rank // 2}"}) == [(0, 2), (0, 2), (1, 2)]


def stand_still(rank: int) -> int:
    while rank == 1:
        time.sleep(0.1)
    return os.getpid()


def test_a_hung_rank_says_where() -> None:
    outcomes = run_ranks(stand_still, 3, comm=False, check=False, timeout=2)
    assert [outcome.ok for outcome in outcomes] == [True, False, True]
    assert outcomes[1].hung
    assert "in stand_still" in outcomes[1].traceback
    with pytest.raises(AssertionError, match=r"1 of 2 ranks failed(.|\n)*rank 1: HUNG(.|\n)*in stand_still"):
        run_ranks(stand_still, 2, comm=False, timeout=1)


def fail(comm: Any) -> None:
    if comm.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    comm.all_reduce(np.ones(1))


def test_a_killed_rank_and_the_error_of_the_other() -> None:
    other, killed = run_ranks(fail, 2, check=False)
    assert killed.exitcode == -signal.SIGKILL
    assert isinstance(other.error, hfreduce.PeerLostError)
    assert other.error.peer == 1
    assert other.seconds < 15
    assert "Traceback" in other.traceback
