"""Collectives of objects: what goes through, and what becomes of objects that cannot be pickled, unpickled or held."""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np
import pytest

import hfreduce
from hfreduce import Communicator, InvalidArgumentError, InvalidUsageError, SystemError_, objects


def environment(nodes: tuple[int, ...]) -> Any:
    return lambda rank: {"HFREDUCE_HOSTID": f"objects-{nodes[rank]}", "HFREDUCE_TRANSPORT": "tcp"}


def thing(rank: int) -> dict[str, Any]:
    return {
        "rank": rank,
        "array": np.arange(rank * 1000, dtype=np.int16),
        "text": "é" * rank,
        "nested": [{rank}, None, (1.5, b"")],
    }


def same(a: Any, b: Any) -> bool:
    return repr(a) == repr(b) and np.array_equal(a["array"], b["array"])


def exchange(comm: Communicator) -> None:
    n, me = comm.nranks, comm.rank
    mine = thing(me)
    everyone = comm.all_gather_object(mine)
    assert len(everyone) == n and all(same(everyone[rank], thing(rank)) for rank in range(n))
    everyone[me]["array"][...] = 1  # a copy of its own, which can be written to
    assert same(mine, thing(me))
    assert comm.all_gather_object(None) == [None] * n
    assert comm.all_gather_object("x" * (300_000 if me == n - 1 else 1))[n - 1] == "x" * 300_000
    for root in range(n):
        got = comm.broadcast_object(thing(root) if me == root else lambda: "never pickled", root)
        assert same(got, thing(root))
        everyone_or_none = comm.gather_object(mine, root)
        if me == root:
            assert all(same(each, thing(rank)) for rank, each in enumerate(everyone_or_none))
        else:
            assert everyone_or_none is None
    assert comm.broadcast_object(mine if me == 0 else None) is mine or me != 0
    assert comm.all_reduce(np.ones(3))[0] == n


@pytest.mark.limit(60)
@pytest.mark.parametrize("nodes", [(0,), (0, 0), (0, 0, 0), (0, 1), (0, 1, 1), (0, 0, 1, 1, 2)], ids=str)
def test_objects_of_all_ranks(run_ranks: Any, nodes: tuple[int, ...]) -> None:
    run_ranks(exchange, len(nodes), env=environment(nodes))


def refused(call: Any) -> tuple[Any, ...]:
    begin = time.monotonic()
    try:
        call()
    except hfreduce.HfreduceError as error:
        return type(error), error.rank, error.peer, str(error), time.monotonic() - begin
    return (None, None, None, "nothing", 0.0)


class Unhappy:
    def __reduce__(self) -> Any:
        raise ValueError("not today")


def cannot_be_pickled(comm: Communicator, call: str, bad: int) -> tuple[Any, ...]:
    found = refused(lambda: getattr(comm, call)(Unhappy() if comm.rank == bad else [comm.rank]))
    assert comm.all_gather_object(comm.rank) == list(range(comm.nranks))  # the communicator goes on
    return found


@pytest.mark.limit(60)
@pytest.mark.parametrize("nodes", [(0, 0, 0), (0, 1, 2)], ids=str)
@pytest.mark.parametrize(
    ("call", "bad"), [("all_gather_object", 1), ("gather_object", 2), ("gather_object", 0), ("broadcast_object", 0)]
)
def test_an_object_that_cannot_be_pickled(run_ranks: Any, nodes: tuple[int, ...], call: str, bad: int) -> None:
    """The rank that has it says why; the others hear of it at once, long before the deadline of a minute."""
    told = run_ranks(cannot_be_pickled, 3, call, bad, env=environment(nodes), comm_timeout=60.0, timeout=50.0)
    for rank, (kind, own, peer, text, seconds) in enumerate(told):
        assert seconds < 20, told
        if rank == bad:
            assert kind is InvalidArgumentError and "obj: this Unhappy cannot be pickled (ValueError: not today)" in text
        else:
            assert kind is InvalidUsageError and (own, peer) == (rank, bad) and f"{call}: rank {bad} gave an object" in text


class Elsewhere:
    """Can be pickled, but unpickled on one rank alone."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def __reduce__(self) -> Any:
        return opened_here, (self.rank,)


def opened_here(rank: int) -> str:
    if rank != int(os.environ["HFREDUCE_RANK"]):
        raise ImportError("no such class here")
    return "opened"


def cannot_be_unpickled(comm: Communicator) -> tuple[Any, ...]:
    found = refused(lambda: comm.all_gather_object(Elsewhere(1) if comm.rank == 1 else 7))
    assert comm.all_gather_object(comm.rank) == [0, 1]
    return found


@pytest.mark.limit(40)
def test_an_object_that_cannot_be_unpickled(run_ranks: Any) -> None:
    told = run_ranks(cannot_be_unpickled, 2)
    assert told[0][:3] == (InvalidUsageError, 0, 1) and "the object of rank 1 cannot be unpickled on rank 0" in told[0][3]
    assert told[1][0] is None


def no_room(comm: Communicator, call: str) -> tuple[Any, ...]:
    real, objects._LARGE = objects.np.empty, 1000

    def empty(size: int, dtype: Any) -> Any:
        if comm.rank == 1 and size >= 1000:
            raise MemoryError
        return real(size, dtype)

    objects.np = type("np", (), {**vars(np), "empty": staticmethod(empty)})
    found = refused(lambda: getattr(comm, call)("x" * 5000, **({"root": 1} if call == "gather_object" else {})))
    assert comm.all_gather_object(1) == [1] * comm.nranks
    return found


@pytest.mark.limit(40)
@pytest.mark.parametrize("call", ["all_gather_object", "gather_object", "broadcast_object"])
def test_a_rank_without_memory(run_ranks: Any, call: str) -> None:
    for kind, _, peer, text, _ in run_ranks(no_room, 3, call):
        assert (kind, peer) == (SystemError_, 1) and "rank 1 has no memory for the" in text


def test_inside_groups_and_after_close() -> None:
    comm = Communicator(0, 1)
    with comm.group(), pytest.raises(InvalidUsageError, match="all_gather_object waits"):
        comm.all_gather_object(1)
    with pytest.raises(InvalidArgumentError, match="root: 1 is not from 0 to 0"):
        comm.gather_object(1, 1)
    comm.close()
    for call in (comm.all_gather_object, comm.gather_object, comm.broadcast_object):
        with pytest.raises(InvalidUsageError, match="closed"):
            call(1)


def too_large(comm: Communicator) -> None:
    """Rank 1 sends more than 2 GiB."""
    data = comm.broadcast_object(np.full((1 << 31) + 5, 7, np.uint8) if comm.rank == 1 else None, 1)
    assert data.size == (1 << 31) + 5 and data[0] == data[-1] == 7


@pytest.mark.slow
@pytest.mark.limit(110)
def test_past_2_gib(run_ranks: Any) -> None:
    run_ranks(too_large, 2, timeout=100.0, comm_timeout=90.0)
